"""Scores candidates in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import fake_quant_ref


def score_candidates_ref(
    x: Tensor, scale: Tensor, zero: Tensor, w: Tensor, target: Tensor, importance: Tensor, *, qmin: int, qmax: int
) -> Tensor:
    scores = []
    for s, z in zip(scale.split(1), zero.split(1), strict=True):
        y = fake_quant_ref(x, s, z, qmin=qmin, qmax=qmax).float() @ w.float().t()
        scores.append(((y - target.float()) * importance.float()).square().sum(0))
    return torch.stack(scores)
