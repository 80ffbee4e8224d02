"""Calls other providers of fake-quant, for the benchmark: each takes the arguments of `fake_quant`."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.formats import Granularity, PerChannel, PerGroup


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity) -> Tensor:
    """Calls torch's own fake-quant: integer zero points only, no gradient to scale and zero."""
    scale, zero = scale.detach(), zero.detach().to(torch.int32)
    if isinstance(granularity, PerGroup):
        rows = x.view(-1, granularity.size)
        return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, qmin, qmax).view(x.shape)
    if isinstance(granularity, PerChannel):
        return torch.fake_quantize_per_channel_affine(x, scale, zero, granularity.axis, qmin, qmax)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, qmin, qmax)


def learnable(x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity) -> Tensor:
    """Calls torch's own learned-step fake-quant: fp32 only."""
    if isinstance(granularity, PerGroup):
        rows = x.view(-1, granularity.size)
        return torch._fake_quantize_learnable_per_channel_affine(rows, scale, zero, 0, qmin, qmax, 1.0).view(x.shape)
    if isinstance(granularity, PerChannel):
        axis = granularity.axis
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, axis, qmin, qmax, 1.0)
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, qmin, qmax, 1.0)
