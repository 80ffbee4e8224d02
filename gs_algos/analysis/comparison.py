"""Holds how far a compressed network is from the float one: each layer, each add and concat, and the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gs_algos.core.table import Table

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts values in equal bins between `low` and `high`."""

    low: float
    high: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, bins: int = BINS) -> Histogram | None:
        """Counts the finite values of a tensor; None if there are none."""
        flat = values.detach().float().flatten()
        flat = flat[flat.isfinite()]
        if not flat.numel():
            return None
        low, high = float(flat.min()), float(flat.max())
        if low == high:
            return cls(low, high, (flat.numel(),))
        return cls(low, high, tuple(map(int, torch.histc(flat, bins, low, high).tolist())))


@dataclass(frozen=True)
class LayerComparison:
    """Says how far one layer is from the float one, and what it takes.

    Args:
        site: its name.
        kind: the class of the compressed layer.
        weight: the scheme, such as `int4@group:64`, or the dtype of a weight that stayed float.
        act: the scheme of its inputs; "" for floats.
        bits: that a weight takes, scales and zero points included.
        nbytes: of the layer's tensors.
        float_nbytes: of the float layer's; 0 if the float network has no layer of this name.
        sqnr: dB, each network on its own inputs; inf if nothing differs, None if there is nothing to compare with.
        local_sqnr: dB, the compressed layer on the float network's inputs.
        cosine: between the outputs of both networks.
        clipped: share of the inputs that lie outside of the range of `act`.
        levels_used, levels: distinct codes of the weight, and how many there are; 0 of a float one.
        weight_values: of the float weight, in steps of the compressed one's scales; as it is where that has none.
        weight_grid: the levels, in the same unit; () of a float one.
        input_values: of the float network's inputs, of the first batch.
        input_range: that inputs are clipped to.
        share_zero: of the compressed weight.
        float_site: name of the layer in the float network, where that is another.
    """

    site: str
    kind: str
    weight: str
    act: str
    bits: float
    nbytes: int
    float_nbytes: int
    sqnr: float | None
    local_sqnr: float | None
    cosine: float | None
    clipped: float | None
    levels_used: int
    levels: int
    weight_values: Histogram | None
    weight_grid: tuple[float, ...]
    input_values: Histogram | None
    input_range: tuple[float, float] | None
    share_zero: float | None = None
    float_site: str = ""


@dataclass(frozen=True)
class JoinComparison:
    """Says what the one scale of an add or a concat costs.

    Args:
        site: as the plan calls it.
        act: the scheme of its operands.
        layer: in front of it, which a rule that sets `join` names.
        places: modules of the float network that give the operands.
        grid_range: smallest and largest value that operands are rounded to.
        sqnr: dB of the operands, the float network's, when they are rounded; inf if nothing differs.
    """

    site: str
    act: str
    layer: str
    places: tuple[str, ...]
    grid_range: tuple[float, float]
    sqnr: float


@dataclass(frozen=True)
class Comparison:
    """Says how far a compressed network is from the float one. `str(comparison)` is a table.

    Args:
        layers: in the order they run; those that did not run come last.
        output_sqnr: dB of the network's outputs.
        joins: adds and concats with one scale for their operands.
    """

    layers: tuple[LayerComparison, ...]
    output_sqnr: float
    notes: tuple[str, ...] = ()
    joins: tuple[JoinComparison, ...] = ()

    def table(self) -> Table:
        rows = [
            (
                one.site,
                one.weight,
                one.act,
                f"{one.bits:.2f}",
                f"{one.nbytes:,}",
                _decibels(one.sqnr),
                _decibels(one.local_sqnr),
                "" if one.clipped is None else f"{one.clipped:.2%}",
                f"{one.levels_used} of {one.levels}" if one.levels else "",
            )
            for one in self.layers
        ]
        rows += [(one.site, "", one.act, "", "", "", _decibels(one.sqnr), "", "") for one in self.joins]
        header = ("layer", "weight", "activation", "bits", "bytes", "SQNR dB", "local dB", "clipped", "levels used")
        below = [f"outputs: {_decibels(self.output_sqnr)} dB", *(f"note: {note}" for note in self.notes)]
        return Table.of(header, rows, "compare", below)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"
