"""Computes L1 products by tensor operations: what a compiler sees without a GPU, and what runs where no kernel does.

A compiler fuses differences and sums, and is given all of them; eager calls take one channel of y at a time, which
needs memory of the size of the unfolded image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.ref import RequantParams, int8_epilogue
from gs_kernels.runtime.torch_private import is_eager


def _patches(x: Tensor, geometry: ConvGeometry, outside: Tensor | float) -> Tensor:
    """Returns `[B, K, P * Q]` fp32, with `outside` beside the image."""
    shifted = x.float() - outside
    columns = unfold(pad(shifted, geometry.sides), (geometry.r, geometry.s), geometry.dilation, 0, geometry.stride)
    return columns + outside


def l1_products(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    outside: Tensor | float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Computes `-sum_k |x - w|`, `[B, O, P, Q]`, contiguous. dtype: of sums and result; int32 where all is whole."""
    patches, w = _patches(x, geometry, outside), weight.float().flatten(1)
    if is_eager(x):
        y = patches.new_empty((patches.shape[0], len(w), patches.shape[2]), dtype=dtype)
        for o, row in enumerate(w):
            y[:, o] = (patches - row[:, None]).abs_().sum(1, dtype=dtype)
    else:
        y = (patches[:, None] - w[:, :, None]).abs().sum(2, dtype=dtype)
    return y.neg().unflatten(2, geometry.output(*x.shape[2:]))


def l1_products_dx(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Computes `sum_o clamp(w - x, -1, 1) dy`, `[B, C, H, W]` fp32, contiguous."""
    patches, w, d = _patches(x, geometry, 0.0), weight.float().flatten(1), dy.float().flatten(2)
    if is_eager(x):
        columns = torch.zeros_like(patches)
        for o, row in enumerate(w):
            columns += (row[:, None] - patches).clamp_(-1, 1).mul_(d[:, o, None])
    else:
        columns = ((w[:, :, None] - patches[:, None]).clamp(-1, 1) * d[:, :, None]).sum(1)
    left, right, top, bottom = geometry.sides
    height, width = x.shape[2:]
    size = (height + top + bottom, width + left + right)
    dx = fold(columns, size, (geometry.r, geometry.s), geometry.dilation, 0, geometry.stride)
    return dx[:, :, top : top + height, left : left + width].contiguous()


def int8_by_operations(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    zero: Tensor | None,
    requant: RequantParams,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Computes `adder_int8`, channels-last."""
    sums = l1_products(x, weight, geometry, 0.0 if zero is None else zero, torch.int32).permute(0, 2, 3, 1)
    if scale is None:
        return sums.contiguous().permute(0, 3, 1, 2)
    rows = (None if requant[0] is None else requant[0].permute(0, 2, 3, 1), *requant[1:])
    return int8_epilogue(sums.float(), scale, bias, rows, activation, dtype).contiguous().permute(0, 3, 1, 2)
