"""The product of float rows with a packed weight, and its gradient: implementations, registration, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.dispatch import implementations, triton_refuses
from gs_kernels.pack.checks import FLOATS
from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qmatmul.checks import check_operands
from gs_kernels.qmatmul.cpu import qmatmul_cpu
from gs_kernels.qmatmul.flat import NUMBERS, TENSORS, numbers_of, packed, tensors_of
from gs_kernels.registration import SOURCE, register


def planar_refuses(x: Tensor, *args: Any) -> list[str]:
    """Why the Triton kernels cannot run a call whose arguments hold a layout by name."""
    reasons = triton_refuses(x)
    if not reasons and PLANAR not in [a for a in args if isinstance(a, str)]:  # a tensor takes 20 us to say it is none
        reasons.append("needs the planar layout, got canonical; use repack(weight, 'planar') once, at load")
    return reasons


def _qmatmul_ref(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    zero: float,
    levels: Tensor | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
    layout: str,
    activation: str,
) -> Tensor:
    """Dequantises to the dtype of x, then multiplies as a float layer does: what a compiler sees without a GPU."""
    weight = packed(codes, scale, zero_points, zero, levels, bits, n, k, group_size, layout)
    y = torch.nn.functional.linear(x, dequantize_packed(weight, x.dtype))
    return ACTIVATIONS[activation].function(y if bias is None else (y.float() + bias.float()).to(x.dtype))


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
) -> Tensor:
    weight = packed(codes, scale, zero_points, zero, levels, bits, n, k, group_size, layout)
    return dy @ dequantize_packed(weight, dy.dtype)


QMATMUL = implementations("qmatmul", _qmatmul_ref, qmatmul_cpu, planar_refuses)
DX = implementations("qmatmul_dx", _dx_ref, refuses=planar_refuses)


def _qmatmul_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], args[7])


def _dx_fake(dy: Tensor, *args: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], args[7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero_points, zero, levels, bias, *numbers, activation, _ = inputs
    # a linear layer's gradient needs no x; with an activation, what went into it is computed again from x
    ctx.save_for_backward(None if activation == "none" else x, codes, scale, zero_points, levels, bias)
    ctx.zero, ctx.numbers, ctx.activation = zero, numbers, activation


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scale, zero_points, levels, bias = ctx.saved_tensors
    parts = (codes, scale, zero_points, ctx.zero, levels)
    if ctx.activation != "none":
        z = _run(x, *parts, bias, *ctx.numbers, "none", SOURCE)
        dy = ACTIVATIONS[ctx.activation].gradient(z, dy)
    dx = _run_dx(dy, *parts, *ctx.numbers, SOURCE) if ctx.needs_input_grad[0] else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype) if ctx.needs_input_grad[6] else None
    return dx, None, None, None, None, None, dbias, *([None] * 7)


def _dx_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero_points, zero, levels, *numbers, _ = inputs
    ctx.save_for_backward(codes, scale, zero_points, levels)
    ctx.zero, ctx.numbers = zero, numbers


def _dx_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_points, levels = ctx.saved_tensors
    parts = (codes, scale, zero_points, ctx.zero, levels, None)
    ddy = _run(ddx, *parts, *ctx.numbers, "none", SOURCE)
    return ddy, *([None] * 11)


_run = register(
    f"qmatmul(Tensor x, {TENSORS}, Tensor? bias, {NUMBERS}, str activation, str source) -> Tensor",
    QMATMUL,
    _qmatmul_fake,
    _gradient,
    _setup_context,
)
_run_dx = register(
    f"qmatmul_dx(Tensor dy, {TENSORS}, {NUMBERS}, str source) -> Tensor", DX, _dx_fake, _dx_gradient, _dx_setup_context
)


def qmatmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`act(x @ W^T + bias)` with `W = (code - zero) * scale`, or `levels[code] * scale`, of a packed weight.

    fp16 and bf16 x: each weight is rounded once to the dtype of x, products are summed in fp32, bias and activation are
    applied there, and the result is rounded once. fp32 x: everything is fp32 (never TF32).
    On a GPU, bf16 x needs |scale| < 2**27: larger scales give infinities or NaN.
    A GPU dequantises the weight once and multiplies as a float layer does where that is fastest (more than some 512
    rows), and above 16 rows for fp32 x and tables of levels.
    Gradients: dx through the packed weight, and dbias. None to the weight, its scale and its zero points. With an
    activation, the backward pass computes its input again instead of saving it.

    Args:
        x: `[..., K]` fp32 / fp16 / bf16. Rows that are not evenly spaced, contiguous along K, are copied once.
        weight: `[N, K]`. On a GPU the planar layout runs in kernels; canonical is dequantised first, each call.
        bias: `[N]` fp32 / fp16 / bf16.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.

    Returns:
        `[..., N]`, dtype of x, contiguous.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or activation is none of the above.
    """
    check_operands("qmatmul", x, FLOATS, weight, bias, activation)
    return _run(x, *tensors_of(weight), bias, *numbers_of(weight), activation, SOURCE)
