"""Finds ranges of tensors, and fake-quantizes in the same pass: implementations, registration, the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import check_granularity, check_grid, check_input, check_qparams, check_values
from gs_kernels.fake_quant.op import gradient, save_for_gradient
from gs_kernels.fake_quant.strided_rows import like
from gs_kernels.formats import PER_TENSOR, Granularity, granularity_of
from gs_kernels.observe.cpu import dynamic_fake_quant_cpu, minmax_cpu, observe_fake_quant_cpu
from gs_kernels.observe.ref import dynamic_fake_quant_ref, minmax_ref, observe_fake_quant_ref
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager


def _minmax_ref(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    return minmax_ref(x, granularity=granularity_of(axis, group))


def _dynamic_ref(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    granularity = granularity_of(axis, group)
    y, scale, zero = dynamic_fake_quant_ref(x, qmin=qmin, qmax=qmax, symmetric=symmetric, granularity=granularity)
    return like(y, x), scale, zero


def _observe_ref(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    y, x_min, x_max = observe_fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax)
    return like(y, x), x_min, x_max


def _channels(x: Tensor, axis: int, group: int) -> int:
    return x.numel() // group if group > 0 else x.shape[axis] if axis >= 0 else 1


def _pair(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(channels, dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)


def _minmax_fake(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    return _pair(x, _channels(x, axis, group))


def _dynamic_fake(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_pair(x, _channels(x, axis, group))


def _observe_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_pair(x, 1)


MINMAX = implementations("minmax", _minmax_ref, minmax_cpu)
DYNAMIC = implementations("dynamic_fake_quant", _dynamic_ref, dynamic_fake_quant_cpu)
OBSERVE = implementations("observe_fake_quant", _observe_ref, observe_fake_quant_cpu)


def _setup_dynamic(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, scale, zero = output
    save_for_gradient(ctx, inputs.x, scale, zero, (inputs.qmin, inputs.qmax, inputs.axis, inputs.group))
    ctx.mark_non_differentiable(scale, zero)


def _dynamic_gradient(ctx: Any, wanted: set[str], dy: Tensor, *_: Tensor) -> dict[str, Tensor | None]:
    return {"x": gradient(ctx, set(), dy)["x"]}


def _setup_observe(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    save_for_gradient(ctx, inputs.x, inputs.scale, inputs.zero, (inputs.qmin, inputs.qmax, -1, 0))
    ctx.mark_non_differentiable(*output[1:])


_minmax = register("minmax(Tensor x, int axis, int group) -> (Tensor, Tensor)", MINMAX, _minmax_fake)
_dynamic = register(
    "dynamic_fake_quant(Tensor x, int qmin, int qmax, bool symmetric, int axis, int group) -> (Tensor, Tensor, Tensor)",
    DYNAMIC,
    _dynamic_fake,
    _dynamic_gradient,
    _setup_dynamic,
)
_observe = register(
    "observe_fake_quant(Tensor x, Tensor scale, Tensor zero, int qmin, int qmax) -> (Tensor, Tensor, Tensor)",
    OBSERVE,
    _observe_fake,
    gradient,
    _setup_observe,
)


def minmax(x: Tensor, *, granularity: Granularity = PER_TENSOR) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value of each channel; NaN if the channel holds one. No gradient.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, any strides, as for `fake_quant`.
        granularity: which elements are one channel.

    Returns:
        x_min, x_max: `[C]` fp32.

    Raises:
        ValueError, TypeError: if x is empty, its dtype is none of the above, or the granularity does not fit its shape.
    """
    check_input("minmax", x)
    axis, group, _ = check_granularity("minmax", x, granularity)
    return _minmax(x.detach(), axis, group)


def dynamic_fake_quant(
    x: Tensor, *, qmin: int, qmax: int, symmetric: bool, granularity: Granularity = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake-quantizes with the scale of x itself: `minmax`, `choose_qparams`, then `fake_quant`, in one launch per row.

    The gradient goes to x only, straight through, scale and zero being constants. For weights, each step.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, any strides, as for `fake_quant`.
        qmin: smallest level, e.g. -8 for int4.
        qmax: largest level, e.g. 7 for int4.
        symmetric: range centred on 0, see `choose_qparams`.
        granularity: which elements share a scale.

    Returns:
        y with shape, dtype and strides of x; scale, zero: `[C]` fp32, without gradient. A channel that holds NaN or Inf
            becomes NaN.

    Raises:
        ValueError, TypeError: as `fake_quant`.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    """
    check_input("dynamic_fake_quant", x)
    check_grid("dynamic_fake_quant", qmin, qmax)
    axis, group, _ = check_granularity("dynamic_fake_quant", x, granularity)
    return _dynamic(x, qmin, qmax, symmetric, axis, group)


def observe_fake_quant(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Does `fake_quant` per tensor and, in the same pass over x, finds its smallest and largest value.

    Gradients as `fake_quant`; the range has none. For activations during training: the range feeds a running average
    that gives the scale of the next step.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, any strides, as for `fake_quant`.
        scale: `[1]` fp32, as for `fake_quant`.
        zero: `[1]` fp32, as for `fake_quant`.
        qmin: smallest level, e.g. 0 for uint8.
        qmax: largest level, e.g. 255 for uint8.

    Returns:
        y with shape, dtype and strides of x; x_min, x_max: `[1]` fp32, NaN if x holds one.

    Raises:
        ValueError, TypeError: as `fake_quant`.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1.
    """
    check_input("observe_fake_quant", x)
    check_grid("observe_fake_quant", qmin, qmax)
    check_qparams("observe_fake_quant", x, scale, zero, 1)
    if scale.device.type == "cpu" and is_eager(x, scale, zero):
        check_values("observe_fake_quant", scale, zero)
    return _observe(x, scale, zero, qmin, qmax)
