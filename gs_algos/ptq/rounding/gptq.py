"""Rounds columns one after the other, each making up for the errors of those before: GPTQ."""

from __future__ import annotations

from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.sweep import sweep
from gs_algos.quant.packed.grid import Grid


def gptq(target: Tensor, grid: Grid, hessian: Hessian) -> Tensor:
    """Returns the codes of one pass over the columns of `target [N, K]` fp32, in the order of the Hessian.

    Source: Frantar et al. 2023, arXiv:2210.17323.
    """
    assert hessian.factor is not None
    return sweep(target, target, grid, hessian.factor, hessian.order, triangular=True)
