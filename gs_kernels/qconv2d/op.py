"""The convolution of a float image with a packed weight, and its gradient: implementations, registration, function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.dispatch import implementations
from gs_kernels.pack.checks import FLOATS, check_tensor
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qconv2d.checks import check_devices, check_operands
from gs_kernels.qconv2d.cpu import qconv2d_cpu
from gs_kernels.qconv2d.dense import convolve_dense, convolve_dx, dense_dtype, empty_image
from gs_kernels.qconv2d.window import Padding, Pair, Window, make_window
from gs_kernels.qmatmul.flat import NUMBERS, TENSORS, numbers_of, packed, tensors_of
from gs_kernels.qmatmul.op import planar_refuses
from gs_kernels.registration import SOURCE, register


def conv_refuses(x: Tensor, *args: Any) -> list[str]:
    """Why the Triton kernels cannot run a call whose arguments hold, in this order, K, a group size and a layout."""
    reasons = planar_refuses(x, *args)
    at = next(i for i, a in enumerate(args) if isinstance(a, str))  # the layout
    k, group_size = args[at - 2 : at]
    if group_size % 32 != 0 and group_size != k:
        reasons.append(f"needs groups of a multiple of 32 elements, or one group, got {group_size}")
    return reasons


def _qconv2d_ref(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero: float,
    levels: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
    layout: str,
    window: list[int],
    activation: str,
    keep: bool,
) -> Tensor:
    """Dequantises, then as a float layer does: what a compiler sees without a GPU."""
    about = Window(*window)
    weight = packed(codes, scale, zero_points, zero, levels, bits, n, k, group_size, layout)
    return convolve_dense(x, dequantize_packed(weight, dense_dtype(x)), bias, residual, about, activation)


def _dx_ref(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero: float,
    levels: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
    layout: str,
    window: list[int],
    h: int,
    w: int,
) -> Tensor:
    about = Window(*window)
    weight = packed(codes, scale, zero_points, zero, levels, bits, n, k, group_size, layout)
    return convolve_dx(dy, dequantize_packed(weight, dense_dtype(dy)), about, h, w)


QCONV2D = implementations("qconv2d", _qconv2d_ref, qconv2d_cpu, conv_refuses)
DX = implementations("qconv2d_dx", _dx_ref, refuses=conv_refuses)


def _qconv2d_fake(x: Tensor, *args: Any) -> Tensor:
    return empty_image(x, args[8], Window(*args[12]), x.dtype)


def _dx_fake(dy: Tensor, *args: Any) -> Tensor:
    window, h, w = args[10:13]
    about = Window(*window)
    size = (dy.shape[0], args[7] // about.taps * about.groups, h, w)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero_points, zero, levels, bias, residual, *numbers, activation, keep, _ = inputs
    # without an activation the gradient needs no x; with one, what went into it is computed again from x
    known = (None, None) if activation == "none" else (x, residual)
    ctx.save_for_backward(*known, codes, scale, zero_points, levels, bias)
    ctx.zero, ctx.numbers, ctx.activation, ctx.keep, ctx.size = zero, numbers, activation, keep, x.shape[2:]
    ctx.residual_dtype = None if residual is None else residual.dtype


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, codes, scale, zero_points, levels, bias = ctx.saved_tensors
    parts = (codes, scale, zero_points, ctx.zero, levels)
    if ctx.activation != "none":
        z = _run(x, *parts, bias, residual, *ctx.numbers, "none", ctx.keep, SOURCE)
        dy = ACTIVATIONS[ctx.activation].gradient(z, dy)
    wanted = ctx.needs_input_grad
    dx = _run_dx(dy, *parts, *ctx.numbers, *ctx.size, SOURCE) if wanted[0] else None
    dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype) if wanted[6] else None
    dresidual = dy.to(ctx.residual_dtype) if wanted[7] else None
    return dx, None, None, None, None, None, dbias, dresidual, *([None] * 9)


def _dx_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero_points, zero, levels, *numbers, _, _, _ = inputs
    ctx.save_for_backward(codes, scale, zero_points, levels)
    ctx.zero, ctx.numbers = zero, numbers


def _dx_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_points, levels = ctx.saved_tensors
    parts = (codes, scale, zero_points, ctx.zero, levels, None, None)
    ddy = _run(ddx, *parts, *ctx.numbers, "none", False, SOURCE)
    return ddy, *([None] * 14)


_run = register(
    f"qconv2d(Tensor x, {TENSORS}, Tensor? bias, Tensor? residual, {NUMBERS}, int[] window, str activation, bool keep,"
    " str source) -> Tensor",
    QCONV2D,
    _qconv2d_fake,
    _gradient,
    _setup_context,
)
_run_dx = register(
    f"qconv2d_dx(Tensor dy, {TENSORS}, {NUMBERS}, int[] window, SymInt h, SymInt w, str source) -> Tensor",
    DX,
    _dx_fake,
    _dx_gradient,
    _dx_setup_context,
)


def qconv2d(
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
    keep_dense: bool = False,
) -> Tensor:
    """`act(conv2d(x, W) + bias + residual)` with `W = (code - zero) * scale`, or `levels[code] * scale`, packed.

    fp16 and bf16 x: each weight is rounded once to the dtype of x, products are summed in fp32, and bias, residual and
    activation are applied there. fp32 x: everything is fp32 (TF32 where cuDNN convolves and torch allows it). No buffer
    of unfolded pixels. On a GPU, bf16 x needs |scale| < 2**27, as for `qmatmul`.
    Gradients: dx through the packed weight, dbias, dresidual. None to the weight, its scale and its zero points.

    Args:
        x: `[B, C, H, W]` fp32 / fp16 / bf16, any strides; channels-last is read fastest on a GPU, nothing is copied
            there. B may be 0.
        weight: `[O, K]`, K = R * S * C / groups in the order (R, S, C / groups), channels fastest: that of a
            `torch.nn.Conv2d` is `conv.weight.permute(0, 2, 3, 1).flatten(1)`. Kernels read the planar layout.
        bias: `[O]` fp32 / fp16 / bf16.
        kernel_size: (R, S), or one number for both, as all pairs.
        stride: pair.
        padding: pair, of zeros, or `same` for stride 1. Other modes: `torch.nn.functional.pad` x beforehand.
        dilation: pair.
        groups: of channels of x and y.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.
        residual: fp32 / fp16 / bf16, the shape of y, any strides.
        keep_dense: on a CPU, dequantise the weight in the first call only and keep that while its codes live, which
            takes the memory of a float layer and saves up to two thirds of the time with few pixels. Changes of its
            tensors through `.data` or numpy are then not seen. A GPU never does.

    Returns:
        `[B, O, P, Q]`, dtype of x, channels-last.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or an argument is none of the above.
    """
    who = "qconv2d"
    window = make_window(who, kernel_size, stride, padding, dilation, groups)
    shape = check_operands(who, x, FLOATS, weight, bias, activation, window)
    if residual is not None:
        check_tensor(who, "residual", residual, FLOATS, shape)
        check_devices(who, x, {"residual": residual})
    args = (*tensors_of(weight), bias, residual, *numbers_of(weight), window.numbers, activation, keep_dense, SOURCE)
    return _run(x, *args)
