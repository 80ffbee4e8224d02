"""Convolutions and their gradients with a weight that is dequantised `[O, K]`, as float layers compute them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_input

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.qconv2d.geometry import ConvGeometry


def empty_image(x: Tensor, o: int, window: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """y, not yet written, channels-last."""
    size = (x.shape[0], o, *window.output(*x.shape[2:]))
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def dense_dtype(x: Tensor) -> torch.dtype:
    """Of a weight to convolve x with: that of x, but for fp16 on the CPU, which multiplies it many times slower."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _filters(w: Tensor, window: ConvGeometry) -> Tensor:
    return w.view(w.shape[0], window.r, window.s, -1).permute(0, 3, 1, 2)


def convolve_dense(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, window: ConvGeometry, activation: str
) -> Tensor:
    """`[B, O, P, Q]`, channels-last, of the dtype of x, computed in that of w."""
    image, padding = x.to(w.dtype), (window.top, window.left)
    if not window.is_symmetric:
        image, padding = pad(image, window.sides), (0, 0)
    inside = None if bias is None else bias.to(w.dtype)
    y = conv2d(image, _filters(w, window), inside, window.stride, padding, window.dilation, window.groups)
    y = y if residual is None else y.float().add_(residual)
    y = ACTIVATIONS[activation].in_place(y)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def convolve_dx(dy: Tensor, w: Tensor, window: ConvGeometry, height: int, width: int) -> Tensor:
    """`[B, C, H, W]`, channels-last, of the dtype of dy, computed in that of w."""
    channels = w.shape[1] // window.taps * window.groups
    size = [dy.shape[0], channels, height + window.top + window.bottom, width + window.left + window.right]
    dx = conv2d_input(size, _filters(w, window), dy.to(w.dtype), window.stride, 0, window.dilation, window.groups)
    inner = dx[:, :, window.top : window.top + height, window.left : window.left + width]
    return inner.to(dy.dtype).contiguous(memory_format=torch.channels_last)
