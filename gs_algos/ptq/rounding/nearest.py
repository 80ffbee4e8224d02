"""Rounds every weight to the nearest code."""

from __future__ import annotations

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.quant.packed.grid import Grid


def nearest(target: Tensor, grid: Grid, hessian: Hessian) -> Tensor:
    """Returns the codes nearest to `target [N, K]`."""
    return grid.codes(target)
