"""What convolutions with a packed weight compute, in the shortest torch that says it: the oracle of every other.

`W [O, K]` has its K in the order (R, S, C / groups), channels fastest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from gs_kernels.fake_quant.ref import quantize_ref
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, unpack_codes
from gs_kernels.qconv2d.window import Padding, Pair, Window, make_window
from gs_kernels.qmatmul.ref import ACTIVATIONS


def columns(x: Tensor, window: Window) -> Tensor:
    """`[B, groups, K, P * Q]`: what each pixel of y sees, in the order of a row of W."""
    x = pad(x, window.sides)
    seen = unfold(x, (window.r, window.s), window.dilation, 0, window.stride)
    return seen.view(x.shape[0], window.groups, -1, window.taps, seen.shape[2]).transpose(2, 3).flatten(2, 3)


def _multiply(w: Tensor, seen: Tensor) -> Tensor:
    """`[B, O, P * Q]` from w `[O, K]` and `columns`."""
    return (w.view(seen.shape[1], -1, w.shape[1]) @ seen).flatten(1, 2)


def _image(y: Tensor, x: Tensor, window: Window) -> Tensor:
    return y.unflatten(2, window.output(*x.shape[2:])).contiguous(memory_format=torch.channels_last)


def _by_channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def qconv2d_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    window = make_window("qconv2d_ref", kernel_size, stride, padding, dilation, groups)
    y = _image(_multiply(dequantize_packed(weight), columns(x.float(), window)), x, window)
    y = y if bias is None else y + _by_channel(bias.float())
    y = y if residual is None else y + residual.float()
    return ACTIVATIONS[activation](y).to(x.dtype)


def integer_sums(x: Tensor, x_zero: Tensor | None, weight: PackedWeight, window: Window) -> Tensor:
    """`[B, O, P, Q]` fp32: the sum over groups of `scale * sum((code - zero) * (x - x_zero))`, each sum exact.

    fp64 holds every integer and half that can occur, so that products and sums are those of int64. A group's sum is
    rounded to fp32 once; zero points go in before, to half steps, and what is left of them after. Groups add in order.
    """
    steps = x.double() if x_zero is None else x.double() - x_zero.double()
    seen = columns(steps, window)
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout).double()
    zero = (
        weight.zero.float() if isinstance(weight.zero, Tensor) else torch.full_like(weight.scale.float(), weight.zero)
    )
    near, size = torch.round(2 * zero) / 2, weight.group_size
    y = torch.zeros(x.shape[0], weight.shape[0], seen.shape[3], device=x.device)
    for g in range(weight.scale.shape[1]):
        part = seen[:, :, g * size : (g + 1) * size]
        sums = _multiply(codes[:, g * size : (g + 1) * size] - near[:, g, None].double(), part).float()
        fraction = (zero - near)[:, g, None]
        x_sums = part.sum(2).float().repeat_interleave(weight.shape[0] // window.groups, 1)  # [B, O, P * Q]
        y = y + (sums - fraction * x_sums) * weight.scale[:, g, None].float()
    return _image(y, x, window)


def finish_int8(
    y: Tensor,
    x_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """From the sums of `integer_sums` to the result: everything in fp32, in this order."""
    y = y * x_scale
    if bias is not None:
        y = y + _by_channel(bias.float())
    if residual is not None:
        real = residual.float()
        if residual_scale is not None:
            real = (real if residual_zero is None else real - residual_zero) * residual_scale
        y = y + real
    y = ACTIVATIONS[activation](y)
    if out_scale is None:
        return y.to(dtype)
    return quantize_ref(
        y, out_scale, torch.zeros_like(out_scale) if out_zero is None else out_zero, qmin=-128, qmax=127
    )


def qconv2d_int8_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    x_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    window = make_window("qconv2d_int8_ref", kernel_size, stride, padding, dilation, groups)
    y = integer_sums(x, x_zero, weight, window)
    about = (residual, residual_scale, residual_zero, out_scale, out_zero)
    return finish_int8(y, x_scale, bias, *about, activation, dtype)


def code_sums_ref(weight: PackedWeight) -> Tensor:
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)
    return codes.unflatten(1, (-1, weight.group_size)).sum(2, dtype=torch.int32)
