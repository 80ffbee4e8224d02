"""Finds the fastest tile of each problem: prunes by machine code, ranks by the cost model, times the best on the GPU.

Without a GPU `Static.rank` still says which tiles can run on a described card, and which should be fastest. The table
is written after each problem, whole; problems that it has are skipped when tuning goes on, unless versions changed.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.device import capabilities
from gs_kernels.runtime.torch_private import tree_leaves
from gs_kernels.tuning.from_machine_code import Predict, Predicted, Progress, Ranking, Static
from gs_kernels.tuning.gpu_specs import CARDS, Card, card_of
from gs_kernels.tuning.space import Machine, Problem, Space, Tile, find_space
from gs_kernels.tuning.tables import Entry, Table, forced, read_table, write_table

logger = logging.getLogger(__name__)

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


def time_call(call: Callable[[], Any]) -> float:
    """Measures the microseconds of the faster fifth of calls, the cache flushed before each."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=60, quantiles=[0.2]))


def measure(space: Space, problem: Problem, candidates: Sequence[Tile], device: str) -> list[Entry]:
    """Times the tiles whose results are those of the reference, fastest first; logs which are not."""
    gpu = capabilities(torch.device(device).index or 0)
    machine = Machine(gpu.sm, gpu.sm_count)
    operands = space.make(problem, device)

    def run() -> Any:
        return space.run(problem, operands, machine)

    with forced(space.op, space.reference(problem, machine)):
        wanted = [t.float() for t in tree_leaves(run())]
    entries = []
    for tile in candidates:
        with forced(space.op, tile):
            try:
                error = max(map(_error, tree_leaves(run()), wanted))
                if not error <= ERROR_MAX:
                    logger.warning("%s: tile %s is off by %.1e of the reference; not timed", problem, tile, error)
                    continue
                entries.append(Entry(problem, tile, round(time_call(run), 3)))
            except RuntimeError as failure:
                logger.warning("%s: tile %s does not run: %s", problem, tile, str(failure).splitlines()[0])
    return sorted(entries, key=lambda entry: entry.us)


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


def card_for(device_name: str, sm: int) -> Card:
    """Returns the description that ranks tiles for a GPU: its own, else that of the nearest kind that is not newer."""
    older = sorted(CARDS.values(), key=lambda card: int(card.target.removeprefix("sm_")))
    fitting = [card for card in older if int(card.target.removeprefix("sm_")) <= sm]
    return card_of(device_name) or (fitting or older)[-1 if fitting else 0]


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
) -> Table:
    """Tunes what the table at path does not have yet, and writes it after each problem.

    Args:
        problems: each with the op of its space. Such that share kernels are best neighbours.
        keep: so many tiles of each problem are timed.
        jobs: processes that compile.
        progress: told how many problems are done, of how many, and what is next.
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
            ranking = static.rank(op, problem, keep, predict=predict)
            entries = measure(find_space(op), problem, shortlist(ranking, machine, keep), device)
            if not entries:
                raise RuntimeError(f"gs_kernels.tuning: one tile must run for {op} {problem}, got none; see the log")
            table = table.replaced(op, entries[0])
            write_table(path, table)
    return table


def name_of(op: str, problem: Problem) -> str:
    return " ".join([op, *(f"{name}={v}" for name, v in problem.items())])
