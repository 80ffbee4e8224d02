"""Finds the fastest tile of each problem: prunes by machine code, ranks by the cost model, times the best on the GPU.

Without a GPU `Static.rank` still says which tiles can run on a described card, and which should be fastest. The table
is written after each problem, whole; problems that it has are skipped when tuning goes on, unless versions changed.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.runtime.device import capabilities
from gs_kernels.runtime.opspec import map_tensors
from gs_kernels.runtime.torch_private import tree_leaves
from gs_kernels.tuning.from_machine_code import Predict, Predicted, Progress, Ranking, Static
from gs_kernels.tuning.gpu_specs import Card, card_for
from gs_kernels.tuning.graph_timing import copies_beyond_cache, round_times
from gs_kernels.tuning.shortlists import ShortList
from gs_kernels.tuning.space import Machine, Problem, Space, Tile, find_space
from gs_kernels.tuning.tables import Entry, Table, forced, read_table, write_table

Note: TypeAlias = Callable[[Tile, float | str], None]

logger = logging.getLogger(__name__)

SECONDS = 0.05  # that a tile is timed for
ALIKE = 3  # tiles of one size that are timed: the model hardly tells them apart
ERROR_MAX = 2e-2  # RMS, relative to that of the reference: rounding of weights to bf16 leaves some 2e-3


def shortlist(ranking: Ranking, machine: Machine, keep: int) -> list[Tile]:
    """Lists the best `keep` tiles, few of one size, then the tile that runs without a table and the reference."""
    space, problem = find_space(ranking.op), ranking.problem
    alike: Counter[tuple[Any, ...]] = Counter()
    best: list[Tile] = []
    for tile in (ranked.tile for ranked in ranking.tiles):
        size = tuple(v for name, v in tile.items() if name not in ("stages", "programs", "scale_parts"))
        if len(best) < keep and alike[size] < ALIKE:
            best.append(tile)
        alike[size] += 1
    for tile in (space.default(problem, machine), space.reference(problem, machine)):
        if tile not in best:
            best.append(tile)
    return best


def time_calls(calls: Sequence[Callable[[], Any]]) -> float:
    """Measures the microseconds of the faster fifth of calls, made in turn as replays of a CUDA graph."""
    ms = sorted(round_times(calls, SECONDS)[0])
    return 1e3 * ms[round(0.2 * (len(ms) - 1))]


def measure(
    space: Space, problem: Problem, candidates: Iterable[Tile], device: str, note: Note | None = None
) -> list[Entry]:
    """Times the tiles whose results are those of the reference, fastest first.

    Args:
        note: told each tile with its microseconds, or why it has none; that is logged too.
    """
    gpu = capabilities(torch.device(device).index or 0)
    machine = Machine(gpu.sm, gpu.sm_count)
    first = space.make(problem, device)
    copies = copies_beyond_cache(sum(t.nbytes for t in _tensors(first)), device)
    operands = [first, *(space.make(problem, device) for _ in range(copies - 1))]
    runs = [partial(space.run, problem, copy, machine) for copy in operands]
    with forced(space.op, space.reference(problem, machine)):
        wanted = [t.float() for t in tree_leaves(runs[0]())]
    entries = []
    for tile in candidates:
        found: float | str
        try:
            with forced(space.op, tile):
                error = max(map(_error, tree_leaves(runs[0]()), wanted))
                found = round(time_calls(runs), 3) if error <= ERROR_MAX else f"is off by {error:.1e} of the reference"
        except Exception as failure:  # noqa: BLE001  the errors of Triton and its compiler have no common class
            found = f"does not run: {type(failure).__name__}: {failure}".splitlines()[0]
        if isinstance(found, str):
            logger.warning("%s: tile %s %s; not timed", problem, tile, found)
        else:
            entries.append(Entry(problem, tile, found))
        if note is not None:
            note(tile, found)
    return sorted(entries, key=lambda entry: entry.us)


def _tensors(operands: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(t: Tensor) -> Tensor:
        found.append(t)
        return t

    for operand in operands if isinstance(operands, tuple) else (operands,):
        map_tensors(add, operand)
    return found


def _error(got: Tensor, want: Tensor) -> float:
    scale = want.square().mean().clamp(min=1e-30)
    return float(((got.float() - want).square().mean() / scale).sqrt())


def made_with() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "triton")}


def open_table(path: Path, device: str) -> Table:
    """Returns the table to go on with: that at path if it is of this GPU and these versions, else an empty one."""
    gpu = capabilities(torch.device(device).index or 0)
    fresh = Table(gpu.name, gpu.sm, gpu.sm_count, made_with(), {})
    if not path.exists():
        return fresh
    table = read_table(path)
    if table.gpu != gpu.name:
        raise ValueError(f"gs_kernels.tuning: {path} must be the table of {gpu.name}, got {table.gpu}")
    if table.made_with != made_with():
        logger.warning("%s was made with %s: tuning all of it again", path, table.made_with)
        return fresh
    return table


_static: Static | None = None  # of a process that only compiles


def _start(card: Card) -> None:
    global _static
    _static = Static(card)


def _predict(op: str, problem: Problem, tile: Tile) -> Predicted:
    assert _static is not None
    return _static.predict(find_space(op), problem, tile)


@contextmanager
def compilers(card: Card, jobs: int) -> Iterator[Predict | None]:
    """Yields what `Static.rank` predicts with: so many processes that share Triton's cache of compiled kernels."""
    if jobs < 2:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start, initargs=(card,)) as pool:
        yield lambda op, problem, tiles: pool.map(partial(_predict, op, problem), tiles)


def tune(
    problems: Sequence[tuple[str, Problem]],
    path: Path,
    *,
    device: str = "cuda",
    keep: int = 12,
    jobs: int = 1,
    progress: Progress | None = None,
    lists: Sequence[ShortList] = (),
    note: Callable[[str, Problem, Tile, float | str], None] | None = None,
) -> Table:
    """Tunes what the table at path does not have yet, and writes it after each problem.

    Args:
        problems: each with the op of its space. Such that share kernels are best neighbours.
        keep: so many tiles of each problem are timed.
        jobs: processes that compile.
        progress: told how many problems are done, of how many, and what is next.
        lists: the only tiles to time for their problems, ranked elsewhere; others are ranked here.
        note: told each tile of each problem with its microseconds, or why it has none.
    """
    for op, problem in problems:
        find_space(op).check(problem)
    table = open_table(path, device)
    static, machine = Static(card_for(table.gpu, table.sm)), Machine(table.sm, table.sm_count)
    with compilers(static.card, jobs) as predict:
        for i, (op, problem) in enumerate(problems):
            if progress is not None:
                progress(i, len(problems), name_of(op, problem))
            if any(entry.problem == problem for entry in table.ops.get(op, ())):
                continue
            tiles = next((known.tiles for known in lists if (known.op, known.problem) == (op, problem)), None)
            if tiles is None:
                tiles = tuple(shortlist(static.rank(op, problem, keep, predict=predict), machine, keep))
            tell = None if note is None else partial(note, op, problem)
            entries = measure(find_space(op), problem, tiles, device, tell)
            if not entries:
                raise RuntimeError(f"gs_kernels.tuning: one tile must run for {op} {problem}, got none; see the log")
            table = table.replaced(op, entries[0])
            write_table(path, table)
    return table


def rank_lists(
    problems: Sequence[tuple[str, Problem]],
    card: Card,
    *,
    keep: int = 12,
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[ShortList]:
    """Ranks tiles by the machine code for a card that need not be there: what `tune` takes as `lists` on it."""
    static, found = Static(card), []
    with compilers(card, jobs) as predict:
        for i, (op, problem) in enumerate(problems):
            if progress is not None:
                progress(i, len(problems), name_of(op, problem))
            ranking = static.rank(op, problem, keep, predict=predict)
            found.append(ShortList(op, problem, tuple(shortlist(ranking, static.machine, keep))))
    return found


def name_of(op: str, problem: Problem) -> str:
    return " ".join([op, *(f"{name}={v}" for name, v in problem.items())])
