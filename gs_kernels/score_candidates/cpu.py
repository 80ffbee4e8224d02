"""Scores candidates on the CPU: fake-quant, BLAS, and sums of its product, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.cpu import fake_quant_cpu

ROWS = 1024  # whose outputs are held at a time


def score_candidates_cpu(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    w: Tensor,
    target: Tensor,
    importance: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    scores = w.new_zeros(len(scale), len(w), dtype=torch.float32)
    wide = w.float().t()
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        part, wanted, counts = x[rows], target[rows].float(), importance[rows].float()
        for i, (s, z) in enumerate(zip(scale.split(1), zero.split(1), strict=True)):
            y = fake_quant_cpu(part, s, z, qmin, qmax, -1, 0).float() @ wide
            scores[i] += ((y - wanted) * counts).square().sum(0)
    return scores
