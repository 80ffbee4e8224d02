"""Scores candidates in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import fake_quant_ref


def score_candidates_ref(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    pearson: bool = False,
) -> Tensor:
    scores = []
    for s, z in zip(scale.split(1), zero.split(1), strict=True):
        y = fake_quant_ref(x, s, z, qmin=qmin, qmax=qmax).float() @ w.float().t()
        scores.append(scores_of(y, target.float(), importance, pearson))
    return torch.stack(scores, 1)


def scores_of(y: Tensor, target: Tensor, importance: Tensor | None, pearson: bool) -> Tensor:
    """Sums over the rows of outputs `[M, N]`, to `[5, N]` if pearson, else `[1, N]`."""
    if pearson:
        return torch.stack([t.sum(0) for t in (target, y, target * target, y * y, target * y)])
    error = y - target
    return (error if importance is None else error * importance).square().sum(0).unsqueeze(0)
