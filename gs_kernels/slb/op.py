"""Mixes the weight that SLB trains, and its gradient: implementations, registration, the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register, save, saved
from gs_kernels.runtime.torch_private import is_eager
from gs_kernels.slb.checks import check_levels, check_values, check_weight
from gs_kernels.slb.cpu import slb_weight_backward_cpu, slb_weight_cpu
from gs_kernels.slb.memory_format import empty_weight, format_of
from gs_kernels.slb.ref import slb_weight_backward_ref, slb_weight_ref


def _weight_ref(
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    shape: Sequence[int],
    hard: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    memory_format = format_of(len(shape), channels_last)
    kwargs: dict[str, Any] = {"hard": hard, "shape": shape, "dtype": dtype, "memory_format": memory_format}
    return slb_weight_ref(logits, levels, temperature, scale, **kwargs)


def _backward_ref(
    dw: Tensor,
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    hard: bool,
    for_logits: bool,
    for_scale: bool,
) -> tuple[Tensor, Tensor]:
    da, dscale = slb_weight_backward_ref(dw, logits, levels, temperature, scale, hard=hard)
    return da.contiguous() if for_logits else logits.new_empty(0), dscale if for_scale else levels.new_empty(0)


SLB_WEIGHT = implementations("slb_weight", _weight_ref, slb_weight_cpu)
BACKWARD = implementations("slb_weight_backward", _backward_ref, slb_weight_backward_cpu)


def _weight_fake(
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    shape: Sequence[int],
    hard: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    return empty_weight(logits, shape, dtype, channels_last)


def _backward_fake(
    dw: Tensor,
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    hard: bool,
    for_logits: bool,
    for_scale: bool,
) -> tuple[Tensor, Tensor]:
    da = torch.empty_like(logits, memory_format=torch.contiguous_format) if for_logits else logits.new_empty(0)
    return da, levels.new_empty(logits.shape[0] if for_scale else 0)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    logits, levels, temperature, scale, _, hard, *_ = inputs
    save(ctx, logits=logits, levels=levels, temperature=temperature, scale=scale, hard=hard)


def _gradient(ctx: Any, wanted: set[str], dw: Tensor) -> dict[str, Tensor | None]:
    *tensors, hard = saved(ctx)
    # a hard choice has no gradient, and None rather than zeros: ordinary optimizers then leave the logits alone
    for_logits, for_scale = "logits" in wanted and not hard, "scale" in wanted
    da, dscale = _backward(dw, *tensors, hard, for_logits, for_scale)
    return {"logits": da if for_logits else None, "scale": dscale if for_scale else None}


def _no_second_gradient(ctx: Any, wanted: set[str], *grads: Tensor) -> dict[str, Tensor | None]:
    raise RuntimeError("slb_weight: its gradient has no gradient of its own; call backward without create_graph=True")


_ARGS = "Tensor logits, Tensor levels, Tensor temperature, Tensor? scale"
_weight = register(
    f"slb_weight({_ARGS}, SymInt[] shape, bool hard, bool channels_last, ScalarType dtype) -> Tensor",
    SLB_WEIGHT,
    _weight_fake,
    _gradient,
    _setup_context,
)
_backward = register(
    f"slb_weight_backward(Tensor dw, {_ARGS}, bool hard, bool for_logits, bool for_scale) -> (Tensor, Tensor)",
    BACKWARD,
    _backward_fake,
    _no_second_gradient,
)


def slb_weight(
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None = None,
    *,
    hard: bool = False,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Mixes a few levels to a weight: `sum_i softmax(logits / temperature)_i * levels_i`, times scale if given.

    In fp32, with one cast at the end. The softmax is never stored: backward reads the logits again. The gradients are
    exact, no straight-through estimate: dlogits_k = dw * scale * P_k * (levels_k - W) / temperature, and dscale = sum
    over the channel of dw * W, both with W before its scale; levels and temperature get none. As the temperature falls,
    W tends to the level of the largest logit, or to the mean of those that tie.

    Two levels can share one plane of logits, `[O, 1, ...]`: that of level 1, while that of level 0 is 0. It takes half
    the memory, and trains as two planes do at half the learning rate.

    Args:
        logits: `[O, L, ...]`, fp32 / fp16 / bf16, 2 <= L <= 256 (or 1, see above): output channel, level, then the
            other axes of the weight. Contiguous logits are read in place; else one contiguous copy is made. Keep those
            of a convolution as `[O, L, K]`: a module's `to(memory_format=torch.channels_last)` rejects five axes.
        levels: `[L]` fp32, finite.
        temperature: `[1]` fp32, in [2**-100, inf).
        scale: `[O]` fp32, a factor for each output channel.
        hard: the weight is the level of the largest logit, the lowest level of those that tie, as `slb_codes`. Then
            logits get no gradient (None), and scale gets its own.
        shape: of the weight, `(O, ...)`; default: the logits' without axis 1.
        dtype: of the weight, fp32 / fp16 / bf16; default: the logits'.
        memory_format: of the weight, `torch.channels_last` (`torch.channels_last_3d`) for 4 (5) axes.

    Returns:
        The weight. NaN logits make NaN weights.

    Raises:
        ValueError: if shapes or devices disagree, logits are empty, L is out of range or, for CPU tensors in eager
            mode, the temperature or a level is. Elsewhere a temperature out of range makes every weight NaN, unless
            hard, since looking would stall the GPU.
        TypeError: if a dtype is not one of the above.

    Source: Yang et al. 2020, arXiv:2009.08695.
    """
    check_levels("slb_weight", logits, levels, temperature, scale)
    size, dtype, channels_last = check_weight("slb_weight", logits, shape, dtype, memory_format)
    if logits.device.type == "cpu" and is_eager(logits, levels, temperature):
        check_values("slb_weight", levels, temperature)
    return _weight(logits, levels, temperature, scale, size, hard, channels_last, dtype)
