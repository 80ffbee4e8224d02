"""Holds grids of int8 codes with all that a pass over codes needs of them, computed once for `requantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import inverse


class Numbers(NamedTuple):
    """Holds a grid as the numbers that C++ takes.

    Args:
        of_codes: scale and zero point of int8 codes.
        to_codes: inverse of the scale, fraction and whole part of that zero point, the smallest and largest code.
        of_floats: the same of the codes that `quantize` gives, which those of an unsigned grid are `moved` against.
    """

    of_codes: tuple[float, float]
    to_codes: tuple[float, float, float, float, float]
    of_floats: tuple[float, float, float, float, float]
    moved: int


@dataclass(frozen=True, eq=False)
class Grid:
    """Holds the grid of int8 codes: real = (code - zero) * scale. It is equal to itself alone, as a key of tables.

    Args:
        scale, zero: `[1]` fp32.
        inverse, whole, fraction: `[1]` fp32: 1 / scale, and the whole part and the fraction of zero.
        low, high: the smallest and largest code.
        numbers: the same as numbers; None unless the tensors are on a CPU.
    """

    scale: Tensor
    zero: Tensor
    inverse: Tensor
    whole: Tensor
    fraction: Tensor
    low: int
    high: int
    numbers: Numbers | None


def make_grid(scale: Tensor, zero: Tensor, qmin: int = -128, qmax: int = 127, lower: int = 0) -> Grid:
    """Makes the grid of int8 codes that are `lower` than those of `quantize`, whose grid is given.

    Args:
        scale, zero: `[1]` fp32; the grid holds them, or copies.
        qmin, qmax: the smallest and largest code of `quantize`.
        lower: 128 for a grid of unsigned codes, else 0.
    """
    moved = zero - lower if lower else zero
    whole = torch.round(moved)
    tensors = (scale, moved, inverse(scale, moved), whole, moved - whole)
    low, high = qmin - lower, qmax - lower
    if not scale.is_cpu:
        return Grid(*tensors, low, high, None)
    real_scale, real_zero, inverted, near, fraction = map(float, tensors)
    given = torch.round(zero)
    of_floats = inverted, float(zero - given), float(given), float(qmin), float(qmax)
    to_codes = inverted, fraction, near, float(low), float(high)
    return Grid(*tensors, low, high, Numbers((real_scale, real_zero), to_codes, of_floats, -lower))
