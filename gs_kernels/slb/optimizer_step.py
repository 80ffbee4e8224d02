"""Updates logits by gradients that are computed as they are used: implementations, registration, public functions.

A step takes dW, the gradient of the weight, which is L times smaller than that of the logits; under data parallelism it
is also what ranks need to exchange. So the logits go into `slb_weight` detached, the weight keeps its `.grad`, and the
step takes that. What is frozen does not change, not even by momentum or weight decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager
from gs_kernels.slb.checks import check_fp32, check_levels, check_rates, check_update, check_values
from gs_kernels.slb.cpu import slb_adamw__cpu, slb_sgd__cpu
from gs_kernels.slb.ref import slb_adamw_ref, slb_sgd_ref


def _adamw_ref(
    logits: Tensor,
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    scale: Tensor | None,
    lr_tensor: Tensor | None,
    frozen: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    state = (logits, exp_avg, exp_avg_sq)
    kwargs: dict[str, Any] = {"betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "frozen": frozen}
    kwargs["lr"] = lr if lr_tensor is None else lr_tensor
    for old, new in zip(
        state, slb_adamw_ref(logits, dw, levels, temperature, exp_avg, exp_avg_sq, step, scale, **kwargs), strict=True
    ):
        old.copy_(new)


def _sgd_ref(
    logits: Tensor,
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    momentum_buffer: Tensor | None,
    scale: Tensor | None,
    lr_tensor: Tensor | None,
    frozen: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    state = (logits,) if momentum_buffer is None else (logits, momentum_buffer)
    kwargs: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    kwargs |= {"frozen": frozen, "lr": lr if lr_tensor is None else lr_tensor}
    for old, new in zip(
        state, slb_sgd_ref(logits, dw, levels, temperature, momentum_buffer, scale, **kwargs), strict=True
    ):
        old.copy_(new)


def _nothing(*_: object) -> None:
    return None


ADAMW = implementations("slb_adamw_", _adamw_ref, slb_adamw__cpu)
SGD = implementations("slb_sgd_", _sgd_ref, slb_sgd__cpu)
_adamw = register(
    "slb_adamw_(Tensor(a!) logits, Tensor dw, Tensor levels, Tensor temperature, Tensor(b!) exp_avg,"
    " Tensor(c!) exp_avg_sq, Tensor step, Tensor? scale, Tensor? lr_tensor, Tensor? frozen,"
    " float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    ADAMW,
    _nothing,
)
_sgd = register(
    "slb_sgd_(Tensor(a!) logits, Tensor dw, Tensor levels, Tensor temperature, Tensor(b!)? momentum_buffer,"
    " Tensor? scale, Tensor? lr_tensor, Tensor? frozen,"
    " float lr, float momentum, float weight_decay, bool nesterov) -> ()",
    SGD,
    _nothing,
)


def slb_adamw_(
    logits: Tensor,
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    scale: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    frozen: Tensor | None = None,
) -> None:
    """Does one step of `torch.optim.AdamW` on the logits of `slb_weight`, given dW: their gradient is never stored.

    Writes logits, exp_avg and exp_avg_sq, each read and written once.

    Args:
        logits: `[O, L, ...]` as for `slb_weight`, contiguous. In 16 bits, steps below half their spacing are lost.
        dw: gradient of the weight that `slb_weight` made of these arguments, any dtype of a weight, any memory format.
        levels: `[L]` fp32.
        temperature: `[1]` fp32.
        exp_avg: shape of logits, contiguous, fp32 (fp16 and bf16 lose small steps); zeros before the first step.
        exp_avg_sq: the same.
        step: `[1]` fp32, the number of this step: 1 for the first. One tensor serves every weight of a model; it is the
            caller's to count, and not to count while frozen.
        scale: `[O]` fp32 as for `slb_weight`.
        lr: learning rate. A `[1]` fp32 tensor is read on the device, also by a captured CUDA graph.
        betas: decay of exp_avg and of exp_avg_sq, in [0, 1).
        eps: added to the root of exp_avg_sq.
        weight_decay: decoupled, times lr.
        frozen: `[1]` bool; True: nothing is written.

    Raises:
        ValueError, TypeError: as `slb_weight`, and if a tensor or a number is not as above.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    who = "slb_adamw_"
    _check(who, logits, dw, levels, temperature, scale, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, frozen)
    check_fp32(who, "step", step, (1,), logits)
    beta1, beta2 = betas
    check_rates(who, lr, logits, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    number, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    with torch.no_grad():
        _adamw(
            *(logits, dw, levels, temperature, exp_avg, exp_avg_sq, step, scale, tensor, frozen),
            *(number, beta1, beta2, eps, weight_decay),
        )
    _written(logits, exp_avg, exp_avg_sq)


def slb_sgd_(
    logits: Tensor,
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    momentum_buffer: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    frozen: Tensor | None = None,
) -> None:
    """Does one step of `torch.optim.SGD` on the logits of `slb_weight`, given dW: their gradient is never stored.

    Writes logits and momentum_buffer, each read and written once. No dampening.

    Args:
        logits: `[O, L, ...]` as for `slb_adamw_`.
        dw: as for `slb_adamw_`.
        levels: `[L]` fp32.
        temperature: `[1]` fp32.
        momentum_buffer: shape of logits, contiguous, fp32 / fp16 / bf16; zeros before the first step; None exactly
            if momentum is 0.
        scale: `[O]` fp32 as for `slb_weight`.
        lr: learning rate, as for `slb_adamw_`.
        momentum: decay of momentum_buffer, in [0, 1).
        weight_decay: times the logits, added to their gradient.
        nesterov: the step looks ahead by one momentum.
        frozen: as for `slb_adamw_`.

    Raises:
        ValueError, TypeError: as `slb_adamw_`.
    """
    who = "slb_sgd_"
    _check(who, logits, dw, levels, temperature, scale, {"momentum_buffer": momentum_buffer}, frozen)
    check_rates(who, lr, logits, momentum=momentum, weight_decay=weight_decay)
    if (momentum > 0) != (momentum_buffer is not None):
        given = "None" if momentum_buffer is None else "a tensor"
        raise ValueError(
            f"{who}: momentum_buffer must be a tensor exactly if momentum > 0, got {given} for momentum={momentum}"
        )
    if nesterov and momentum == 0:
        raise ValueError(f"{who}: nesterov must come with momentum > 0, got momentum=0; use nesterov=False")
    number, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    with torch.no_grad():
        _sgd(
            *(logits, dw, levels, temperature, momentum_buffer, scale, tensor, frozen),
            *(number, momentum, weight_decay, nesterov),
        )
    _written(logits, *(() if momentum_buffer is None else (momentum_buffer,)))


def _check(
    who: str,
    logits: Tensor,
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    state: dict[str, Tensor | None],
    frozen: Tensor | None,
) -> None:
    check_levels(who, logits, levels, temperature, scale)
    check_update(who, logits, dw, state, frozen)
    if logits.device.type == "cpu" and is_eager(logits, levels, temperature):
        check_values(who, levels, temperature)


def _written(*state: Tensor) -> None:
    """Lets autograd notice, if one of them was saved for a backward pass that has not run yet."""
    if is_eager(*state):
        torch.autograd.graph.increment_version(state)
