"""Computes L1 products in the shortest torch that says it: the oracle of every other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, pad, unfold

from gs_kernels.qconv2d.geometry import ConvGeometry, Padding, Pair, make_geometry
from gs_kernels.qconv2d.ref import int8_epilogue, requant_params


def _patches(x: Tensor, geometry: ConvGeometry, outside: float = 0.0) -> Tensor:
    """Copies what each pixel of y sees side by side: `[B, K, P * Q]`, K in the order (C, R, S) of a weight."""
    x = pad(x.float(), geometry.sides, value=outside)
    return unfold(x, (geometry.r, geometry.s), geometry.dilation, 0, geometry.stride)


def _l1(patches: Tensor, w: Tensor) -> Tensor:
    """Computes `-sum_k |x - w|`, `[B, O, L]`, and lets autograd find the gradients of adder networks.

    The gradient of `-(x - w)^2 / 2` by w is x - w, that of `-huber(x - w)` by x is clamp(w - x, -1, 1).
    """
    x, w = torch.broadcast_tensors(patches[:, None], w.float()[:, :, None])
    differentiable = -(x.detach() - w).square() / 2 - huber_loss(x, w.detach(), reduction="none")
    return (-(x - w).abs().detach() + (differentiable - differentiable.detach())).sum(2)


def adder_conv2d_ref(x: Tensor, weight: Tensor, stride: Pair = 1, padding: Padding = 0, dilation: Pair = 1) -> Tensor:
    geometry = make_geometry("adder_conv2d_ref", (weight.shape[2], weight.shape[3]), stride, padding, dilation, 1)
    y = _l1(_patches(x, geometry), weight.flatten(1))
    return y.unflatten(2, geometry.output(*x.shape[2:])).to(x.dtype)


def adder_linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    y = _l1(x.float().reshape(1, -1, x.shape[-1]).mT, weight)
    return y[0].mT.reshape(*x.shape[:-1], -1).to(x.dtype)


def integer_sums(x: Tensor, weight: Tensor, geometry: ConvGeometry, zero: Tensor | None) -> Tensor:
    """Returns `[B, O, P, Q]` int32: `-sum |x - w|` of codes, beside the image that of zero."""
    patches = _patches(x, geometry, 0.0 if zero is None else float(zero)).int()
    y = -(patches[:, None] - weight.flatten(1).int()[:, :, None]).abs().sum(2, dtype=torch.int32)
    return y.unflatten(2, geometry.output(*x.shape[2:])).contiguous(memory_format=torch.channels_last)


def adder_int8_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    zero: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    geometry = make_geometry("adder_int8_ref", (weight.shape[2], weight.shape[3]), stride, padding, dilation, 1)
    sums = integer_sums(x, weight, geometry, zero)
    if scale is None:
        return sums
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    rows = (None if residual is None else residual.permute(0, 2, 3, 1), *requant[1:])
    y = int8_epilogue(sums.permute(0, 2, 3, 1).float(), scale, bias, rows, activation, dtype)
    return y.contiguous().permute(0, 3, 1, 2)
