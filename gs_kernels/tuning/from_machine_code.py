"""Predicts how fast a tile is on a described card from its machine code: nothing here is timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from gs_kernels.aot.ir_cost import work_of
from gs_kernels.aot.report import Report, report
from gs_kernels.aot.trace import trace_launcher
from gs_kernels.tuning.cost_model import estimate_all, predict_call
from gs_kernels.tuning.gpu_specs import Card, assumed
from gs_kernels.tuning.space import Machine, Problem, Space, Tile, find_space
from gs_kernels.tuning.tables import forced


@dataclass(frozen=True)
class Ranked:
    """Holds a tile with its predicted microseconds. issue_us: of its instructions alone, which decides ties.

    launched: code and grid of its kernels.
    """

    tile: Tile
    us: float
    issue_us: float
    launched: tuple[Any, ...] = ()


Predicted: TypeAlias = Ranked | str
Predict: TypeAlias = Callable[[str, Problem, Iterable[Tile]], Iterable[Predicted]]
Progress: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Ranking:
    """Holds tiles in order. tiles: best first. pruned: why others were not considered -> how many."""

    op: str
    problem: Problem
    tiles: tuple[Ranked, ...]
    pruned: Counter[str]


class Static:
    """Compiles tiles for one card, each kernel once, and predicts what calls take on it."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.machine = Machine(card.sm, card.sm_count)
        self.reports: dict[Any, Report] = {}

    def report(self, compiled: Any) -> Report:
        if compiled not in self.reports:
            self.reports[compiled] = report(compiled, self.card.target, elements=1)
        return self.reports[compiled]

    def predict(self, space: Space, problem: Problem, tile: Tile) -> Predicted:
        """Returns the tile with its time, or why it is of no use: it spills, or no block of it fits.

        Only spills of kernels that the space is for count: others run with any tile.
        """
        operands = space.make(problem, "meta")
        try:
            with forced(space.op, tile), assumed(self.card):
                trace = trace_launcher(lambda: space.run(problem, operands, self.machine), self.card.target)
        except Exception as error:  # noqa: BLE001  the compiler's own errors have no common class
            return f"does not compile: {type(error).__name__}"
        kernels = [self.report(launch.compiled) for launch in trace.launches]
        if any(kernel.spills for kernel in kernels if kernel.kernel in space.kernels):
            return "spills"
        if tight := [kernel.occupancy.limiter for kernel in kernels if not kernel.occupancy.blocks]:
            return f"does not fit: {tight[0]}"
        parts = estimate_all(kernels, [work_of(launch) for launch in trace.launches], self.card)
        parts += [predict_call(call, self.card) for call in trace.calls]
        launched = tuple((launch.compiled.hash, launch.grid) for launch in trace.launches)
        return Ranked(tile, sum(p.us for p in parts), sum(p.instructions_us for p in parts), launched)

    def predict_all(self, op: str, problem: Problem, tiles: Iterable[Tile]) -> Iterator[Predicted]:
        return (self.predict(find_space(op), problem, tile) for tile in tiles)

    def rank(
        self, op: str, problem: Problem, keep: int, progress: Progress | None = None, predict: Predict | None = None
    ) -> Ranking:
        """Ranks tiles that compile without spills and fit by time, the best `keep` also with other parts of K.

        Args:
            progress: told how many tiles are done, of how many, and what is done with them.
            predict: instead of `predict_all`, in whatever processes.
        """
        space = find_space(op)
        default = space.default(problem, self.machine)
        usual = default.get("programs")
        pruned: Counter[str] = Counter()
        found: dict[Any, Ranked] = {}

        def add(tiles: list[Tile]) -> None:
            for i, got in enumerate((predict or self.predict_all)(op, problem, tiles)):
                if progress is not None:
                    progress(i + 1, len(tiles), f"compiling for {self.card.target}")
                if isinstance(got, str):
                    pruned[got] += 1
                else:
                    found.setdefault(got.launched, got)  # K may have no more parts with more programs

        candidates = [_with_programs(tile, usual) for tile in space.candidates(problem)]
        add(candidates if default in candidates else [*candidates, default])
        best = [ranked.tile for ranked in _sorted(found)[:keep] if _splits(ranked.tile)]
        add([_with_programs(tile, n) for n in space.choices.get("programs", ()) if n != usual for tile in best])
        return Ranking(op, problem, tuple(_sorted(found)), pruned)


def _splits(tile: Tile) -> bool:
    return "programs" in tile and not tile.get("dense")


def _with_programs(tile: Tile, programs: int | None) -> Tile:
    return {**tile, "programs": programs} if _splits(tile) else tile


def _sorted(found: dict[Any, Ranked]) -> list[Ranked]:
    """Sorts by time, no finer than a percent, then by instructions, then in the order of the space."""
    return sorted(found.values(), key=lambda r: (round(100 * math.log(r.us)), r.issue_us))
