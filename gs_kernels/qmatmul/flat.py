"""A packed weight as the arguments that an op schema can carry, and back."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight

TENSORS = "Tensor codes, Tensor scale, Tensor? zero_points, float zero, Tensor? levels"
NUMBERS = "int bits, SymInt n, SymInt k, int group_size, str layout"

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]
Numbers: TypeAlias = tuple[int, int, int, int, str]


def tensors_of(weight: PackedWeight) -> Tensors:
    """codes, scale, zero points or None, the zero of all otherwise, levels or None."""
    if isinstance(weight.zero, Tensor):
        return weight.codes, weight.scale, weight.zero, 0.0, weight.levels
    return weight.codes, weight.scale, None, float(weight.zero), weight.levels


def numbers_of(weight: PackedWeight) -> Numbers:
    return weight.bits, *weight.shape, weight.group_size, weight.layout


def packed(
    codes: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero: float,
    levels: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
    layout: str,
) -> PackedWeight:
    """The weight of which `tensors_of` and `numbers_of` are the parts."""
    points = zero if zero_points is None else zero_points
    return PackedWeight(codes, scale, points, levels, bits, (n, k), group_size, layout)
