"""Convolves with a dequantized weight `[O, K]` as float layers do, and computes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_input

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.runtime.device import convolves_in_fp32

Convolves: TypeAlias = Callable[[Tensor, Tensor | None, tuple[int, int]], Tensor]  # of the image, bias and padding


def empty_image(x: Tensor, o: int, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Allocates y, not yet written, channels-last."""
    size = (x.shape[0], o, *geometry.output(*x.shape[2:]))
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def dense_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of a weight to convolve x with: that of x, but fp32 for fp16 on a CPU, which is slow at it."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def filters_of(w: Tensor, geometry: ConvGeometry) -> Tensor:
    """Shows a weight `[O, K]` as filters `[O, C / groups, R, S]`, channels-last."""
    return w.view(w.shape[0], geometry.r, geometry.s, -1).permute(0, 3, 1, 2)


def convolve_dense(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: ConvGeometry, activation: str
) -> Tensor:
    """Convolves x in the dtype of w; returns `[B, O, P, Q]`, channels-last, in the dtype of x."""
    return convolve_by(by_filters(filters_of(w, geometry), geometry), x, w.dtype, bias, residual, geometry, activation)


def by_filters(filters: Tensor, geometry: ConvGeometry) -> Convolves:
    """Returns the convolution with filters `[O, C / groups, R, S]`."""
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    return lambda image, bias, padding: conv2d(image, filters, bias, stride, padding, dilation, groups)


def convolve_by(
    convolve: Convolves,
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
) -> Tensor:
    """Does as `convolve_dense` by a function of the image, the bias and the padding, all in `dtype`."""
    image, padding = x.to(dtype), (geometry.top, geometry.left)
    if not geometry.is_symmetric:
        image, padding = pad(image, geometry.sides), (0, 0)
    with convolves_in_fp32(image):
        y = convolve(image, None if bias is None else bias.to(dtype), padding)
    y = y if residual is None else y.float().add_(residual)
    y = ACTIVATIONS[activation].in_place(y)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def convolve_dx(dy: Tensor, w: Tensor, geometry: ConvGeometry, height: int, width: int) -> Tensor:
    """Computes dx in the dtype of w; returns `[B, C, H, W]`, channels-last, in the dtype of dy."""
    channels = w.shape[1] // geometry.taps * geometry.groups
    size = [dy.shape[0], channels, height + geometry.top + geometry.bottom, width + geometry.left + geometry.right]
    dy_w = dy.to(w.dtype)
    with convolves_in_fp32(dy_w):
        dx = conv2d_input(size, filters_of(w, geometry), dy_w, geometry.stride, 0, geometry.dilation, geometry.groups)
    inner = dx[:, :, geometry.top : geometry.top + height, geometry.left : geometry.left + width]
    return inner.to(dy.dtype).contiguous(memory_format=torch.channels_last)
