"""Defines fake-quant and its gradient: implementations, registration, the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.as_ops import plain_backward, plain_fake_quant
from gs_kernels.fake_quant.checks import check_granularity, check_grid, check_input, check_qparams, check_values
from gs_kernels.fake_quant.cpu import fake_quant_backward_cpu, fake_quant_cpu
from gs_kernels.formats import PER_TENSOR, Granularity
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register, save, saved
from gs_kernels.runtime.torch_private import is_eager

FAKE_QUANT = implementations("fake_quant", plain_fake_quant, fake_quant_cpu)
BACKWARD = implementations("fake_quant_backward", plain_backward, fake_quant_backward_cpu)


def _fake_quant_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    for_scale: bool,
    for_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = scale.shape[0]
    return torch.empty_like(x), scale.new_empty(n if for_scale else 0), scale.new_empty(n if for_zero else 0)


def save_for_gradient(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, grid: tuple[int, int, int, int]) -> None:
    """Saves what the gradient needs; grid: qmin, qmax, axis, group, as the ops take them."""
    save(ctx, x=x, scale=scale, zero=zero, grid=grid)


def gradient(ctx: Any, wanted: set[str], dy: Tensor, *_: Tensor) -> dict[str, Tensor | None]:
    """Gives the gradients of x, scale and zero, of what `save_for_gradient` saved, if they are wanted."""
    x, scale, zero, grid = saved(ctx)
    for_scale, for_zero = "scale" in wanted, "zero" in wanted
    dx, dscale, dzero = _backward(dy, x, scale, zero, *grid, for_scale, for_zero)
    return {"x": dx, "scale": dscale if for_scale else None, "zero": dzero if for_zero else None}


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, scale, zero, *grid = inputs
    save_for_gradient(ctx, x, scale, zero, tuple(grid))


def _no_second_gradient(ctx: Any, wanted: set[str], *grads: Tensor) -> dict[str, Tensor | None]:
    raise RuntimeError(
        "fake_quant: the straight-through gradient has no gradient of its own; call backward without create_graph=True"
    )


_ARGS = "Tensor x, Tensor scale, Tensor zero, int qmin, int qmax, int axis, int group"
_run = register(f"fake_quant({_ARGS}) -> Tensor", FAKE_QUANT, _fake_quant_fake, gradient, _setup_context)
_backward = register(
    f"fake_quant_backward(Tensor dy, {_ARGS}, bool for_scale, bool for_zero) -> (Tensor, Tensor, Tensor)",
    BACKWARD,
    _backward_fake,
    _no_second_gradient,
)


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
    if (y := _run.repeat(x, scale, zero, qmin, qmax, axis, group)) is not None:
        return y
    check_qparams("fake_quant", x, scale, zero, channels)
    if scale.device.type == "cpu" and is_eager(x, scale, zero):
        check_values("fake_quant", scale, zero)
    return _run(x, scale, zero, qmin, qmax, axis, group)
