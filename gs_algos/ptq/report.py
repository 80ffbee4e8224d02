"""Says what PTQ did to a network: the objective of every layer, the error behind every block, time and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gs_algos.core.table import Table

MASSIVE = 20.0  # times the median RMS of a channel, from which on a channel counts as massive


@dataclass(frozen=True)
class LayerReport:
    """Says how well one weight was rounded.

    Args:
        rows: that the statistics hold.
        ratio: squared error of the layer's output over that of rounding to nearest.
        held_out: the same on data that no statistic holds; None if there was none.
        notes: what went wrong.
        transforms: what became of those that were asked for.
        tuned: squared error of the block's output over that before its layers were tuned, held out; None if they were
            not.
    """

    site: str
    scheme: str
    rows: int
    ratio: float
    held_out: float | None
    notes: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    tuned: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes), "transforms": list(self.transforms)}

    @property
    def tuning(self) -> tuple[str, ...]:
        return () if self.tuned is None else (f"tuned: block error x {math.sqrt(self.tuned):.3f}",)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerReport:
        return cls(**{**data, "notes": tuple(data["notes"]), "transforms": tuple(data["transforms"])})


@dataclass(frozen=True)
class BlockReport:
    """Says how far the output of a block is from the float one: RMS of the difference over RMS of the output.

    Args:
        error: of all channels.
        without_massive: of the channels that are not massive, which hide the error of the others.
    """

    block: str
    error: float
    without_massive: float


class BlockErrors:
    """Sums the squares of outputs and differences by channel, the last axis."""

    def __init__(self) -> None:
        self.count = 0
        self.difference: Tensor | None = None
        self.output: Tensor | None = None

    def update(self, want: Tensor, got: Tensor) -> None:
        axis = 1 if want.dim() in (4, 5) else -1  # feature maps have their channels there
        want, got = (x.movedim(axis, -1).reshape(-1, x.shape[axis]).double() for x in (want, got))
        parts = [(got - want).square().sum(0), want.square().sum(0)]
        self.difference = parts[0] if self.difference is None else self.difference + parts[0]
        self.output = parts[1] if self.output is None else self.output + parts[1]
        self.count += len(want)

    def report(self, block: str) -> BlockReport:
        assert self.difference is not None and self.output is not None
        size = self.output.sqrt()
        usual = size <= MASSIVE * size.median()
        return BlockReport(block, self._error(torch.ones_like(usual)), self._error(usual))

    def _error(self, kept: Tensor) -> float:
        assert self.difference is not None and self.output is not None
        size = self.output[kept].sum()
        return float((self.difference[kept].sum() / torch.where(size > 0, size, 1.0)).sqrt())


@dataclass(frozen=True)
class PTQReport:
    """Says what PTQ did to a network. `str(report)` is a table.

    Args:
        rows: that the statistics of a layer hold at most: tokens, or patches of images.
        seconds: that it took.
        in_memory, on_disk: bytes of activations at most, in memory and in files.
        held_out: batches that entered no statistic.
    """

    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    rows: int
    seconds: float
    in_memory: int
    on_disk: int
    held_out: int

    def table(self) -> Table:
        """Returns one line a layer, the errors of the blocks and the totals below."""
        rows = [
            (
                layer.site,
                layer.scheme,
                f"{layer.ratio:.3f}",
                "" if layer.held_out is None else f"{layer.held_out:.3f}",
                "; ".join((*layer.notes, *layer.transforms, *layer.tuning)),
            )
            for layer in self.layers
        ]
        below = [
            f"{one.block}: error {one.error:.2%}, {one.without_massive:.2%} without massive channels"
            for one in self.blocks
        ]
        below.append(
            f"{len(self.layers)} layers from {self.rows:,} rows each in {self.seconds:.1f} s; activations took "
            f"{self.in_memory:,} bytes in memory, {self.on_disk:,} on disk"
        )
        return Table.of(("layer", "weight", "error / nearest", "held out", "notes"), rows, "PTQ", below)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
