"""Tunes on the device: times the tiles of short lists, and writes the table of this GPU after each problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bench.gpu.items import Context, Failed, Item, Row
from bench.gpu.timed import MACHINE, Forced, tile_row
from gs_kernels.runtime.device import capabilities
from gs_kernels.tuning.shortlists import ShortList, read_lists
from gs_kernels.tuning.space import Problem, find_space
from gs_kernels.tuning.tables import file_name
from gs_kernels.tuning.tuner import tune

read = cache(read_lists)


@dataclass(frozen=True)
class Tune(Item):
    """Times the tiles of one problem. Without a list of it: the default and the reference, of which one may win."""

    problem: Problem = None  # type: ignore[assignment]

    def tiles_of(self, shortlist: Path | None) -> ShortList:
        known = () if shortlist is None else read(shortlist)
        space = find_space(self.op)
        usual = [space.default(self.problem, MACHINE), space.reference(self.problem, MACHINE)]
        default = ShortList(self.op, self.problem, tuple(t for i, t in enumerate(usual) if t not in usual[:i]))
        return next((one for one in known if (one.op, one.problem) == (self.op, self.problem)), default)

    def run(self, context: Context) -> Iterator[Row]:
        rows: list[Row] = []
        path = context.tables / file_name(capabilities(torch.cuda.current_device()).name)
        lists = [self.tiles_of(context.shortlist)]
        try:
            tune([(self.op, self.problem)], path, lists=lists, note=lambda *tried: rows.append(tile_row(*tried)))
        finally:
            yield from rows
        if not rows:
            raise Failed(f"{path} has this problem already")

    def make_up(self, context: Context) -> Iterator[Row]:
        for i, tile in enumerate(self.tiles_of(context.shortlist).tiles):
            yield tile_row(self.op, self.problem, tile, 10.0 + i)

    def launch(self, context: Context) -> None:
        Forced(self.id, self.op, self.bits, self.problem, self.tiles_of(context.shortlist).tiles).launch(context)
