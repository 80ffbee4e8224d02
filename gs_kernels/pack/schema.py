"""Flattens a packed weight into the plain arguments that an op's schema can carry, and back: the only place for it."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.runtime.torch_op import Carried

SCHEMA = (
    "Tensor codes, Tensor scale, Tensor? zero_points, float zero, Tensor? levels,"
    " int bits, SymInt n, SymInt k, int group_size, str layout, Tensor? divisor"
)

# codes, scale, zero points or None, the zero of all otherwise, levels or None
Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]


def tensors_of(weight: PackedWeight) -> Tensors:
    """Gives the tensors of a weight, and its zero point if it has one for all."""
    if isinstance(weight.zero, Tensor):
        return weight.codes, weight.scale, weight.zero, 0.0, weight.levels
    return weight.codes, weight.scale, None, float(weight.zero), weight.levels


def flatten(weight: PackedWeight) -> tuple[Tensor | float | str | None, ...]:
    """Gives a weight as the arguments that `SCHEMA` names."""
    return *tensors_of(weight), weight.bits, *weight.shape, weight.group_size, weight.layout, weight.divisor


def unflatten(
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
    divisor: Tensor | None,
) -> PackedWeight:
    """Makes the weight that `flatten` took apart."""
    points = zero if zero_points is None else zero_points
    return PackedWeight(codes, scale, points, levels, bits, (n, k), group_size, layout, divisor)


PACKED_WEIGHT = Carried(PackedWeight, SCHEMA, flatten, unflatten, ("codes", "scale", "zero", "levels", "divisor"))
