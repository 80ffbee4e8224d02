"""Convolves float images with a packed weight, and the gradient: implementations, registration, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.checks import FLOATS, check_tensor
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qconv2d.checks import check_devices, check_operands
from gs_kernels.qconv2d.cpu.float import FloatConvolution, qconv2d_cpu, repeated
from gs_kernels.qconv2d.dense import convolve_dense, convolve_dx, dense_dtype, empty_image
from gs_kernels.qconv2d.geometry import GEOMETRY, ConvGeometry, ConvolvesImages, Padding, Pair, make_geometry
from gs_kernels.qmatmul.op import planar_refuses
from gs_kernels.runtime.dispatch import choose, implementations
from gs_kernels.runtime.torch_op import register, save, saved


def conv_refuses(x: Tensor, weight: PackedWeight, *rest: object) -> list[str]:
    """Gives the reasons why the Triton kernels cannot run a convolution of x with a weight."""
    reasons = planar_refuses(x, weight)
    geometry = next((a for a in rest if isinstance(a, ConvGeometry)), None)
    if geometry is not None and geometry.reach(x) >= 1 << 31:
        reasons.append(
            f"needs the pixels under a filter less than 2**31 elements apart, got strides {tuple(x.stride())}"
        )
    size = weight.group_size
    if size % 32 != 0 and size != weight.shape[1]:
        reasons.append(f"needs groups of a multiple of 32 elements, or one group, got {size}")
    if weight.divisor is not None:
        reasons.append("needs scales without a divisor")
    return reasons


def _qconv2d_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    keep: bool,
) -> Tensor:
    """Dequantizes, then convolves as a float layer does: what a compiler sees without a GPU."""
    return convolve_dense(x, dequantize_packed(weight, dense_dtype(x)), bias, residual, geometry, activation)


def _dx_ref(dy: Tensor, weight: PackedWeight, geometry: ConvGeometry, h: int, w: int) -> Tensor:
    return convolve_dx(dy, dequantize_packed(weight, dense_dtype(dy)), geometry, h, w)


QCONV2D = implementations("qconv2d", _qconv2d_ref, qconv2d_cpu, conv_refuses, FloatConvolution)
DX = implementations("qconv2d_dx", _dx_ref, refuses=conv_refuses)


def _qconv2d_fake(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    keep: bool,
) -> Tensor:
    return empty_image(x, weight.shape[0], geometry, x.dtype)


def _dx_fake(dy: Tensor, weight: PackedWeight, geometry: ConvGeometry, h: int, w: int) -> Tensor:
    size = (dy.shape[0], weight.shape[1] // geometry.taps * geometry.groups, h, w)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, bias, residual, geometry, activation, keep = inputs
    # without an activation the gradient needs no x; with one, what went into it is computed again from x
    operands = {"x": None, "residual": None} if activation == "none" else {"x": x, "residual": residual}
    save(ctx, **operands, weight=weight, bias=bias, geometry=geometry, activation=activation, keep=keep)
    ctx.size, ctx.residual_dtype = x.shape[2:], None if residual is None else residual.dtype


def _gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    x, residual, weight, bias, geometry, activation, keep = saved(ctx)
    if activation != "none":
        dy = ACTIVATIONS[activation].gradient(_run(x, weight, bias, residual, geometry, "none", keep), dy)
    return {
        "x": _run_dx(dy, weight, geometry, *ctx.size) if "x" in wanted else None,
        "bias": dy.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype) if "bias" in wanted else None,
        "residual": dy.to(ctx.residual_dtype) if "residual" in wanted else None,
    }


def _dx_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, weight=inputs.weight, geometry=inputs.geometry)


def _dx_gradient(ctx: Any, wanted: set[str], ddx: Tensor) -> dict[str, Tensor | None]:
    weight, geometry = saved(ctx)
    return {"dy": _run(ddx, weight, None, None, geometry, "none", False)}


_run = register(
    "qconv2d(Tensor x, PackedWeight weight, Tensor? bias, Tensor? residual, ConvGeometry geometry, str activation,"
    " bool keep) -> Tensor",
    QCONV2D,
    _qconv2d_fake,
    _gradient,
    _setup_context,
    carried=(PACKED_WEIGHT, GEOMETRY),
)
_run_dx = register(
    "qconv2d_dx(Tensor dy, PackedWeight weight, ConvGeometry geometry, SymInt h, SymInt w) -> Tensor",
    DX,
    _dx_fake,
    _dx_gradient,
    _dx_setup_context,
    carried=(PACKED_WEIGHT, GEOMETRY),
)


class BoundConvolution:
    """Prepares `qconv2d` on a GPU: nothing is kept but the other arguments, and a call launches as the last like it."""

    def __init__(
        self, weight: PackedWeight, geometry: ConvGeometry, bias: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        self.weight, self.geometry, self.bias, self.activation = weight, geometry, bias, activation

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images and, if a dtype is named, residuals; it takes other shapes, too."""
        weight, bias, geometry, activation = self.weight, self.bias, self.geometry, self.activation

        def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
            if (y := _run.repeat(x, weight, bias, residual, geometry, activation, True)) is not None:
                return y  # type: ignore[no-any-return]
            _check(x, weight, bias, residual, geometry, activation)
            return _run(x, weight, bias, residual, geometry, activation, True)  # type: ignore[no-any-return]

        return convolve


def prepared_qconv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
) -> FloatConvolution | BoundConvolution | None:
    """Prepares `qconv2d(x, ..., keep_dense=True)` for many images like x: checks all but image and residual once.

    `at(shape, dtype of residuals)` of the result is the function of images; nothing looks at their shapes, at
    gradients, and at changes of the weight, any more. None where the implementation of this device prepares nothing.
    """
    who = "qconv2d"
    geometry = make_geometry(who, kernel_size, stride, padding, dilation, groups)
    check_operands(who, x, FLOATS, weight, bias, activation, geometry)
    chosen = choose(who, QCONV2D, x, weight)
    prepare = BoundConvolution if chosen.name == "triton" else chosen.prepare
    try:
        return prepare and prepare(weight, geometry, bias, activation, x.dtype)
    except UnsuitableError:
        return None


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
    activation are applied there. fp32 x: everything is fp32 (TF32 only in compiled code, where torch allows it). No
    buffer of unfolded pixels. On a GPU, bf16 x needs |scale| < 2**27, as for `qmatmul`.
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
        keep_dense: on a CPU, dequantize the weight in the first call only and keep that while its codes live, which
            saves up to two thirds of the time with few pixels. It takes the memory of a float layer for each of the
            first four sizes of images, one and several apart, and once for all others. Changes of the weight's tensors
            through `.data` or numpy then go unnoticed. A GPU never does.

    Returns:
        `[B, O, P, Q]`, dtype of x, channels-last.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or an argument is none of the above.
    """
    geometry = make_geometry("qconv2d", kernel_size, stride, padding, dilation, groups)
    if (y := _run.repeat(x, weight, bias, residual, geometry, activation, keep_dense)) is not None:
        return y
    if keep_dense and (y := repeated(x, weight, bias, residual, geometry, activation)) is not None:
        return y
    _check(x, weight, bias, residual, geometry, activation)
    return _run(x, weight, bias, residual, geometry, activation, keep_dense)


def _check(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
) -> None:
    shape = check_operands("qconv2d", x, FLOATS, weight, bias, activation, geometry)
    if residual is not None:
        check_tensor("qconv2d", "residual", residual, FLOATS, shape)
        check_devices("qconv2d", x, {"residual": residual})
