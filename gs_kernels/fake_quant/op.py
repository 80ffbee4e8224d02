"""Fake-quant, quantize and dequantize: checks, implementations, registration, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.dispatch import Impl, choose, is_eager
from gs_kernels.fake_quant.checks import (
    check_codes,
    check_granularity,
    check_grid,
    check_input,
    check_qparams,
    check_values,
)
from gs_kernels.fake_quant.ref import dequantize_ref, fake_quant_backward_ref, fake_quant_ref, quantize_ref
from gs_kernels.formats import PER_TENSOR, Granularity, PerChannel, PerGroup, PerTensor
from gs_kernels.registration import SOURCE, register


def granularity_of(axis: int, group: int) -> Granularity:
    if group > 0:
        return PerGroup(int(group))
    return PerChannel(int(axis)) if axis >= 0 else PerTensor()


def _ref_forward(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    y = fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity_of(axis, group))
    return like(y, x)


def _ref_backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dzero = fake_quant_backward_ref(
        dy, x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity_of(axis, group)
    )
    if not learned:
        dscale, dzero = scale.new_empty(0), scale.new_empty(0)
    return like(dx, x), dscale, dzero


def _ref_quantize(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return like(quantize_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity_of(axis, group)), x)


def _ref_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    return like(dequantize_ref(codes, scale, zero, granularity=granularity_of(axis, group), dtype=dtype), codes)


def like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of `torch.empty_like(x)`, which differ where groups cross the memory order of x."""
    want = torch.empty_like(x, dtype=y.dtype, device="meta").stride()
    return y if y.stride() == want else torch.empty_like(x, dtype=y.dtype).copy_(y)


def _runs_anywhere(*_: object) -> list[str]:
    return []


FORWARD = (Impl("ref", _ref_forward, _runs_anywhere),)
BACKWARD = (Impl("ref", _ref_backward, _runs_anywhere),)
QUANTIZE = (Impl("ref", _ref_quantize, _runs_anywhere),)
DEQUANTIZE = (Impl("ref", _ref_dequantize, _runs_anywhere),)


def _forward(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int, source: str = ""
) -> Tensor:
    args = (x.detach(), scale.detach(), zero.detach(), qmin, qmax, axis, group)
    return choose("fake_quant", FORWARD, *args).run(*args)


def _backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    learned: bool,
    source: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    args = (dy.detach(), x.detach(), scale.detach(), zero.detach(), qmin, qmax, axis, group, learned)
    return choose("fake_quant_backward", BACKWARD, *args).run(*args)


def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int, source: str = ""
) -> Tensor:
    args = (x, scale, zero, qmin, qmax, axis, group)
    return choose("quantize", QUANTIZE, *args).run(*args)


def _dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype, source: str = ""
) -> Tensor:
    args = (codes, scale, zero, axis, group, dtype)
    return choose("dequantize", DEQUANTIZE, *args).run(*args)


_QPARAMS = "Tensor x, Tensor scale, Tensor zero, int qmin, int qmax, int axis, int group"
register(f'fake_quant({_QPARAMS}, str source="") -> Tensor', _forward)
register(
    f'fake_quant_backward(Tensor dy, {_QPARAMS}, bool learned, str source="") -> (Tensor, Tensor, Tensor)', _backward
)
register(f'quantize({_QPARAMS}, str source="") -> Tensor', _quantize)
register(
    "dequantize(Tensor codes, Tensor scale, Tensor zero, int axis, int group, ScalarType dtype,"
    ' str source="") -> Tensor',
    _dequantize,
)


def save_for_gradient(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, grid: tuple[int, int, int, int]) -> None:
    """grid: qmin, qmax, axis, group, as the ops take them."""
    ctx.save_for_backward(x, scale, zero)
    ctx.grid = grid


def gradient(ctx: Any, dy: Tensor, learned: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dscale, dzero of what `save_for_gradient` saved; None for scale and zero unless learned."""
    x, scale, zero = ctx.saved_tensors
    dx, dscale, dzero = torch.ops.gs_kernels.fake_quant_backward(dy, x, scale, zero, *ctx.grid, learned, SOURCE)
    return (dx, dscale, dzero) if learned else (dx, None, None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero, qmin, qmax, axis, group, _ = inputs
    save_for_gradient(ctx, x, scale, zero, (qmin, qmax, axis, group))


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    return *gradient(ctx, dy, learned), None, None, None, None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "fake_quant: the straight-through gradient has no gradient of its own; call backward without create_graph=True"
    )


torch.library.register_autograd("gs_kernels::fake_quant", _gradient, setup_context=_setup_context)
torch.library.register_autograd("gs_kernels::fake_quant_backward", _no_second_gradient)


def fake_quant(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity = PER_TENSOR
) -> Tensor:
    """Rounds x to the integer grid of each channel and back: `(clamp(round(x / s) + z, qmin, qmax) - z) * s`.

    Rounds half to even, in fp32, with one 1 / s per channel and one cast at the end. A zero point with a fraction
    shifts the grid: `round(x / s + frac(z)) + round(z)`, so that zero = -0.5 on -1..0 gives the two values ±s / 2.
    Gradients: dx = dy inside the grid and 0 outside; scale and zero get theirs only if they require it (learned steps):
    dscale = sum of dy * (q - z - x / s inside, q - z outside), dzero = sum of dy * (0 inside, -s outside).
    NaN in x gives NaN, Inf the end of the grid.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, any strides. Dense x (any memory format) and slices of rows are read in place;
            else one contiguous copy is made, as when groups cross the memory order of x.
        scale: `[C]` fp32, in [2**-126, inf). Real units per step. C is 1, `x.shape[axis]` or `x.numel() // size`.
        zero: `[C]` fp32, within ±2**20. The level that stands for 0.0 (0 for a symmetric signed grid).
        qmin: smallest level, e.g. -8 for int4.
        qmax: largest level, e.g. 7 for int4.
        granularity: which elements share a scale.

    Returns:
        shape, dtype and (if x is dense) strides of x.

    Raises:
        ValueError: if shapes or devices disagree, qmin >= qmax, x is empty or, for CPU tensors in eager mode, a scale
            or zero is out of its range. Elsewhere such a channel becomes NaN, since looking would stall the GPU.
        TypeError: if a dtype is not one of the above.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1) and section 3; Esser et al. 2020, arXiv:1902.08153, eq. (3).
    """
    check_input("fake_quant", x)
    check_grid("fake_quant", qmin, qmax)
    axis, group, channels = check_granularity("fake_quant", x, granularity)
    check_qparams("fake_quant", x, scale, zero, channels)
    if scale.device.type == "cpu" and is_eager(x, scale, zero):
        check_values("fake_quant", scale, zero)
    return torch.ops.gs_kernels.fake_quant(x, scale, zero, qmin, qmax, axis, group, SOURCE)


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity = PER_TENSOR
) -> Tensor:
    """The integer codes of x: `clamp(round(x / s) + z, qmin, qmax)`, rounded exactly as `fake_quant` does. No gradient.

    NaN has no code: it becomes qmin.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, as for `fake_quant`.
        scale: `[C]` fp32, as for `fake_quant`.
        zero: `[C]` fp32, as for `fake_quant`.
        qmin: smallest level, >= -128, or >= 0 for uint8 codes.
        qmax: largest level, <= 127, or <= 255 for uint8 codes.
        granularity: which elements share a scale.

    Returns:
        shape and strides of x, int8 if qmin < 0 else uint8.

    Raises:
        ValueError, TypeError: as `fake_quant`, and if the levels do not fit the codes.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1).
    """
    check_input("quantize", x)
    check_codes("quantize", qmin, qmax)
    axis, group, channels = check_granularity("quantize", x, granularity)
    check_qparams("quantize", x, scale, zero, channels)
    if scale.device.type == "cpu" and is_eager(x, scale, zero):
        check_values("quantize", scale, zero)
    return torch.ops.gs_kernels.quantize(x.detach(), scale.detach(), zero.detach(), qmin, qmax, axis, group, SOURCE)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The real values of codes: `(q - z) * s`. No gradient.

    Args:
        codes: `[...]`, int8 or uint8.
        scale: `[C]` fp32, as for `fake_quant`.
        zero: `[C]` fp32, as for `fake_quant`.
        granularity: which elements share a scale.
        dtype: of the result: fp32 / fp16 / bf16.

    Returns:
        shape and strides of codes.

    Raises:
        ValueError, TypeError: as `fake_quant`.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1).
    """
    check_input("dequantize", codes, (torch.int8, torch.uint8))
    axis, group, channels = check_granularity("dequantize", codes, granularity)
    check_qparams("dequantize", codes, scale, zero, channels)
    return torch.ops.gs_kernels.dequantize(codes, scale.detach(), zero.detach(), axis, group, dtype, SOURCE)
