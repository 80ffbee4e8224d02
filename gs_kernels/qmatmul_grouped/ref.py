"""Computes products with the packed weights of experts in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed


def qmatmul_grouped_ref(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    experts, (rows, k) = len(offsets), weight.shape
    w = dequantize_packed(weight).view(experts, -1, k)
    y = x.new_zeros(x.shape[0], rows // experts, dtype=torch.float32)
    first = 0
    for e, end in enumerate(offsets.tolist()):
        y[first:end] = x[first:end].float() @ w[e].T
        if bias is not None:
            y[first:end] += bias.float().view(experts, -1)[e]
        first = end
    return y.to(x.dtype)
