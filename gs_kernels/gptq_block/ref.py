"""Rounds columns in turn in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_block_ref(
    values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None = None, *, qmin: int, qmax: int
) -> Tensor:
    values, change = values.clone(memory_format=torch.contiguous_format), torch.empty_like(start)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    for j in range(len(values)):
        code = values[j] * inverse[j]
        code = (code if zero is None else code + zero[j]).clamp(qmin, qmax).round()
        code = code if zero is None else code - zero[j]
        change[j] = code * scale[j] - start[j]
        values[j + 1 :] -= factor[:, j, j + 1 :].t().unsqueeze(2) * change[j]
    return change
