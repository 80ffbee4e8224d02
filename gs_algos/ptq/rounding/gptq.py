"""Rounds columns one after the other, each making up for the errors of those before: GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.sweep import BLOCK, Sweep, row_pieces
from gs_algos.quant.packed.grid import Grid


@torch.no_grad()
def gptq(target: Tensor, grid: Grid, hessian: Hessian) -> Tensor:
    """Returns the codes of one pass over the columns of `target [N, K]` fp32, in the order of the Hessian.

    Source: Frantar et al. 2023, arXiv:2210.17323.
    Differs from the paper: the errors of columns before are gathered by the factor of H, not pushed to those behind by
    that of its inverse: the same codes (Babai's nearest plane), without the inverse.
    """
    assert hessian.factor is not None
    codes = []
    for rows in row_pieces(len(target), len(hessian.factor)):
        part = target[rows]
        sweep = Sweep(part, part, grid.rows(rows), hessian.factor, hessian.order)
        for first in range(0, target.shape[1], BLOCK):
            sweep.round(first, sweep.pull(first, first + BLOCK, slice(0, first)))
        codes.append(sweep.result()[1])
    return torch.cat(codes)
