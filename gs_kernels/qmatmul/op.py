"""Multiplies float rows with a packed weight, and the gradient: implementations, registration, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.checks import FLOATS
from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qmatmul.checks import check_operands
from gs_kernels.qmatmul.cpu.float import FloatProduct, qmatmul_cpu
from gs_kernels.runtime.dispatch import choose, implementations, triton_refuses
from gs_kernels.runtime.torch_op import register, save, saved


def planar_refuses(x: Tensor, weight: PackedWeight, *_: object) -> list[str]:
    """Gives the reasons why the Triton kernels cannot run a product of x with a weight."""
    reasons = triton_refuses(x)
    if not reasons and weight.layout != PLANAR:
        reasons.append("needs the planar layout, got canonical; use repack(weight, 'planar') once, at load")
    if not reasons and weight.group_size % 16 and weight.group_size != weight.shape[1]:
        reasons.append(f"needs groups of a multiple of 16 elements, or one group, got {weight.group_size}")
    return reasons


def _qmatmul_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """Dequantizes to the dtype of x, then multiplies as a float layer does: what a compiler sees without a GPU."""
    y = torch.nn.functional.linear(x, dequantize_packed(weight, x.dtype))
    return ACTIVATIONS[activation].function(y if bias is None else (y.float() + bias.float()).to(x.dtype))


def _dx_ref(dy: Tensor, weight: PackedWeight) -> Tensor:
    return dy @ dequantize_packed(weight, dy.dtype)


QMATMUL = implementations("qmatmul", _qmatmul_ref, qmatmul_cpu, planar_refuses, FloatProduct)
DX = implementations("qmatmul_dx", _dx_ref, refuses=planar_refuses)


def _qmatmul_fake(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _dx_fake(dy: Tensor, weight: PackedWeight) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    # a linear layer's gradient needs no x; with an activation, what went into it is computed again from x
    x = None if inputs.activation == "none" else inputs.x
    save(ctx, x=x, weight=inputs.weight, bias=inputs.bias, activation=inputs.activation)


def _gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    x, weight, bias, activation = saved(ctx)
    if activation != "none":
        dy = ACTIVATIONS[activation].gradient(_run(x, weight, bias, "none"), dy)
    dx = _run_dx(dy, weight) if "x" in wanted else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype) if "bias" in wanted else None
    return {"x": dx, "bias": dbias}


def _dx_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, weight=inputs.weight)


def _dx_gradient(ctx: Any, wanted: set[str], ddx: Tensor) -> dict[str, Tensor | None]:
    (weight,) = saved(ctx)
    return {"dy": _run(ddx, weight, None, "none")}


_run = register(
    "qmatmul(Tensor x, PackedWeight weight, Tensor? bias, str activation) -> Tensor",
    QMATMUL,
    _qmatmul_fake,
    _gradient,
    _setup_context,
    carried=(PACKED_WEIGHT,),
)
_run_dx = register(
    "qmatmul_dx(Tensor dy, PackedWeight weight) -> Tensor",
    DX,
    _dx_fake,
    _dx_gradient,
    _dx_setup_context,
    carried=(PACKED_WEIGHT,),
)


def qmatmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`act(x @ W^T + bias)` with `W = (code - zero) * scale`, or `levels[code] * scale`, of a packed weight.

    fp16 and bf16 x: each weight is rounded once to the dtype of x (in C++ on a CPU, not at all), products are summed in
    fp32, bias and activation are applied there, and the result is rounded once. A CPU rounds such x to 16 bits below
    the largest of a group, where that loses little beside the rounding of the result (see Numerics). fp32 x: all is
    fp32 (never TF32).
    On a GPU, bf16 x needs |scale| < 2**27: larger scales give infinities or NaN.
    A GPU dequantizes the weight, 256 MiB of it at a time, and multiplies as a float layer does where that is fastest
    (more than 2,048 rows on Hopper, 512 on Ampere), above 16 rows for fp32 x and tables of levels, and for dx.
    Gradients: dx through the packed weight, and dbias. None to the weight, its scale and its zero points. With an
    activation, the backward pass computes its input again instead of saving it.

    Args:
        x: `[..., K]` fp32 / fp16 / bf16. Rows that are not evenly spaced, contiguous along K, are copied once.
        weight: `[N, K]`. On a GPU the planar layout runs in kernels; canonical is dequantized first, each call.
        bias: `[N]` fp32 / fp16 / bf16.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.

    Returns:
        `[..., N]`, dtype of x, contiguous.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or activation is none of the above.
    """
    if (y := _run.repeat(x, weight, bias, activation)) is not None:
        return y
    check_operands("qmatmul", x, FLOATS, weight, bias, activation)
    return _run(x, weight, bias, activation)


def prepared_qmatmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none"
) -> FloatProduct | None:
    """Prepares `qmatmul` for all x of these dtype and device; `at(shape, dtype)` of the result is the function of x.

    Takes and refuses what `qmatmul` does. Weight and bias must not change while the product is used, which gives no
    gradient. None where the implementation of this device prepares nothing.
    """
    check_operands("qmatmul", x, FLOATS, weight, bias, activation)
    prepare = choose("qmatmul", QMATMUL, x, weight).prepare
    return prepare and prepare(weight, bias, activation)
