"""Finds the fastest tile of each problem: prunes by machine code, ranks by the cost model, times the best on the GPU.

Without a GPU `rank` still says which tiles can run on a described card, and which should be fastest. The table is
written after each problem, whole; problems that it has are skipped when tuning goes on, unless versions changed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gs_kernels.device import capabilities
from gs_kernels.qmatmul.tiles import default_rule
from gs_kernels.tuning.cards import CARDS, Card, card_of
from gs_kernels.tuning.qmatmul import CHOICES, DENSE, Product, Static, runner, tiles
from gs_kernels.tuning.tables import Entry, Table, read_table, write_table

logger = logging.getLogger(__name__)

OP = "qmatmul"
ALIKE = 3  # tiles of one size that are timed: the model hardly tells them apart
ERROR_MAX = 2e-2  # RMS, relative to that of the dense product: rounding of weights to bf16 leaves some 2e-3
Progress = Callable[[int, int, str], None]  # done, of how many, what


@dataclass(frozen=True)
class Ranked:
    """A tile with its predicted microseconds. issue_us: of its instructions alone; less is better if us is the same."""

    tile: dict[str, Any]
    us: float
    issue_us: float


@dataclass(frozen=True)
class Ranking:
    """tiles: best first, the dense product among them. pruned: why others were not considered -> how many."""

    problem: Product
    tiles: tuple[Ranked, ...]
    pruned: Counter[str]


def rank(problem: Product, static: Static, progress: Progress | None = None) -> Ranking:
    """Every tile that compiles without spills and fits, with each way to split K, by predicted time."""
    found = [Ranked(DENSE, static.predict_dense(problem), 0.0)]
    pruned: Counter[str] = Counter()
    candidates = list(tiles(problem.m))
    for i, tile in enumerate(candidates):
        if progress is not None:
            progress(i, len(candidates), f"compiling for {static.card.target}")
        kernel = static.kernel(problem, tile)
        if isinstance(kernel, str):
            pruned[kernel] += 1
            continue
        splits = set()
        for programs in CHOICES["programs"]:
            whole = {**tile, "programs": programs}
            split = problem.plan(whole, static.sm, static.card.sm_count).parts(problem.k // 128)
            if split not in splits:
                found.append(Ranked(whole, *static.predict(problem, whole)))
            splits.add(split)
    # predictions are not better than a percent; then fewer instructions, then the order of the space
    ordered = sorted(found, key=lambda r: (round(100 * math.log(r.us)), r.issue_us, tuple(map(int, r.tile.values()))))
    return Ranking(problem, tuple(ordered), pruned)


def shortlist(ranking: Ranking, sm: int, keep: int) -> list[dict[str, Any]]:
    """The best `keep` tiles, few of one size, the tile that runs without a table, and always the dense product."""
    alike: Counter[tuple[Any, ...]] = Counter()
    best: list[dict[str, Any]] = []
    for tile in (ranked.tile for ranked in ranking.tiles):
        size = tuple(tile[name] for name in ("block_m", "block_n", "warps"))
        if len(best) < keep and (tile["dense"] or alike[size] < ALIKE):
            best.append(tile)
        alike[size] += 1
    return best + [tile for tile in (untuned(ranking.problem, sm), DENSE) if tile not in best]


def untuned(problem: Product, sm: int) -> dict[str, Any]:
    rule = default_rule(problem.m, sm)
    tile = {"dense": rule.plan.dense, "programs": rule.programs} | vars(rule.plan)
    return DENSE if rule.plan.dense else {name: tile[name] for name in CHOICES}


def time_call(call: Callable[[], Tensor]) -> float:
    """Microseconds of the faster fifth of calls, the cache flushed before each."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=10, rep=60, quantiles=[0.2]))


def measure(problem: Product, candidates: Sequence[dict[str, Any]], device: str) -> list[Entry]:
    """Times the tiles whose products agree with the dense one, fastest first; says in the log which do not."""
    about = capabilities(torch.device(device).index or 0)
    make = runner(problem, device, about.sm, about.sm_count)
    want = make(DENSE)().float()
    entries = []
    for tile in candidates:
        call = make(tile)
        try:
            error = ((call().float() - want).square().mean() / want.square().mean()).sqrt().item()
            if not error <= ERROR_MAX:
                logger.warning("%s: tile %s is off by %.1e of the dense product; not timed", problem, tile, error)
                continue
            entries.append(Entry(vars(problem), tile, round(time_call(call), 3)))
        except RuntimeError as failure:
            logger.warning("%s: tile %s does not run: %s", problem, tile, str(failure).splitlines()[0])
    return sorted(entries, key=lambda entry: entry.us)


def made_with() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "triton")}


def open_table(path: Path, device: str) -> Table:
    """The table to go on with: what is at path, if it is of this GPU and these versions, else an empty one."""
    about = capabilities(torch.device(device).index or 0)
    fresh = Table(about.name, about.sm, about.sm_count, made_with(), {})
    if not path.exists():
        return fresh
    table = read_table(path)
    if table.gpu != about.name:
        raise ValueError(f"gs_kernels.tuning: {path} must be the table of {about.name}, got {table.gpu}")
    if table.made_with != made_with():
        logger.warning("%s was made with %s: tuning all of it again", path, table.made_with)
        return fresh
    return table


def card_for(device_name: str, sm: int) -> Card:
    """The description that ranks tiles for a GPU: its own, else that of the nearest kind that is not newer."""
    older = sorted(CARDS.values(), key=lambda card: int(card.target.removeprefix("sm_")))
    fitting = [card for card in older if int(card.target.removeprefix("sm_")) <= sm]
    return card_of(device_name) or (fitting or older)[-1 if fitting else 0]


def tune(
    problems: Sequence[Product], path: Path, *, device: str = "cuda", keep: int = 12, progress: Progress | None = None
) -> Table:
    """Tunes what the table at path does not have yet, and writes it after each problem.

    Args:
        problems: sizes, best sorted so that equal bits follow each other.
        keep: so many tiles of each problem are timed.
        progress: told how many problems are done, of how many, and what is next.
    """
    table = open_table(path, device)
    static = Static(card_for(table.gpu, table.sm))
    for i, problem in enumerate(problems):
        if progress is not None:
            progress(i, len(problems), " ".join(f"{name}={v}" for name, v in vars(problem).items()))
        if any(entry.problem == vars(problem) for entry in table.ops.get(OP, ())):
            continue
        entries = measure(problem, shortlist(rank(problem, static), table.sm, keep), device)
        if not entries:
            raise RuntimeError(f"gs_kernels.tuning: one tile must run for {problem}, got none; see the log")
        table = table.replaced(OP, entries[0])
        write_table(path, table)
    return table
