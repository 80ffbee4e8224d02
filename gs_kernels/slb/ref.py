"""Computes SLB in the shortest torch that says it: the oracle of every other implementation.

Logits are `[O, L, ...]`: output channel, level, then the other dimensions of the weight. fp64 stays fp64, all else is
computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gs_kernels.pack.pack import pack_codes

TAU_MIN = 2.0**-100  # a gradient divided by it still has 2**28 of room in fp32
TAU_MAX = torch.finfo(torch.float32).max


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def planes(logits: Tensor) -> Tensor:
    """Returns the logits of every level, `[O, L, R]`. A single plane is that of level 1; level 0 then has 0."""
    a = wide(logits).flatten(2)
    return torch.cat([torch.zeros_like(a), a], 1) if a.shape[1] == 1 else a


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """Computes P = softmax(A / tau) over the levels, `[O, L, R]`, shifted before the division: tau may be tiny."""
    tau = torch.where((temperature >= TAU_MIN) & (temperature <= TAU_MAX), temperature, torch.nan)
    a = planes(logits)
    return torch.softmax((a - a.amax(1, keepdim=True).detach()) / tau, 1)


def choices(logits: Tensor) -> Tensor:
    """Returns the level of the largest logit, int64 `[O, R]`: the lowest of equals, and NaN counts as infinity."""
    a = planes(logits)
    return torch.where(a.isnan(), torch.inf, a).argmax(1)


def mix(p: Tensor, levels: Tensor) -> Tensor:
    """Computes W_c = sum_i P_i v_i, `[O, R]`."""
    return (p * levels.view(1, -1, 1)).sum(1)


def chosen(logits: Tensor, levels: Tensor) -> Tensor:
    """Computes W_q = v_argmax(A), `[O, R]`; NaN where a logit is."""
    return torch.where(planes(logits).isnan().any(1), torch.nan, levels[choices(logits)])


def slb_weight_ref(
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
    w = chosen(logits, levels) if hard else mix(probabilities(logits, temperature), levels)
    if scale is not None:
        w = w * scale.view(-1, 1)
    size = tuple(shape) if shape is not None else (logits.shape[0], *logits.shape[2:])
    return w.to(dtype or logits.dtype).view(size).contiguous(memory_format=memory_format)


def slb_weight_backward_ref(
    dw: Tensor,
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None = None,
    *,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes dlogits, `dA_k = dW * s * P_k * (v_k - W_c) / tau` (0 if hard), and dscale, `sum of dW * W_c`."""
    g = wide(dw).reshape(dw.shape[0], -1)
    if hard:
        return torch.zeros_like(logits), (g * chosen(logits, levels)).sum(1)
    p = probabilities(logits, temperature)
    w = mix(p, levels)
    s = 1.0 if scale is None else scale.view(-1, 1)
    da = (g * s / temperature).unsqueeze(1) * p * (levels.view(1, -1, 1) - w.unsqueeze(1))
    return da[:, -logits.shape[1] :].reshape(logits.shape).to(logits.dtype), (g * w).sum(1)


def slb_codes_ref(logits: Tensor) -> Tensor:
    return choices(logits).to(torch.uint8).view(logits.shape[0], *logits.shape[2:])


def slb_pack_ref(logits: Tensor, *, bits: int) -> Tensor:
    return pack_codes(choices(logits).to(torch.uint8), bits)


def slb_adamw_ref(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the new logits, exp_avg and exp_avg_sq of Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2."""
    g = wide(slb_weight_backward_ref(dw, wide(logits), levels, temperature, scale)[0])
    m = betas[0] * wide(exp_avg) + (1 - betas[0]) * g
    v = betas[1] * wide(exp_avg_sq) + (1 - betas[1]) * g * g
    t = step.double()
    correction1, correction2 = (1 - betas[0] ** t).to(m.dtype), (1 - betas[1] ** t).to(m.dtype)
    a = wide(logits) * (1 - lr * weight_decay) - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    return _unless(frozen, (logits, a), (exp_avg, m), (exp_avg_sq, v))  # type: ignore[return-value]


def slb_sgd_ref(
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
) -> tuple[Tensor, ...]:
    """Returns the new logits and, if there is one, momentum_buffer, as `torch.optim.SGD` without dampening."""
    g = wide(slb_weight_backward_ref(dw, wide(logits), levels, temperature, scale)[0]) + weight_decay * wide(logits)
    if momentum_buffer is None:
        return _unless(frozen, (logits, wide(logits) - lr * g))
    b = momentum * wide(momentum_buffer) + g
    step = g + momentum * b if nesterov else b
    return _unless(frozen, (logits, wide(logits) - lr * step), (momentum_buffer, b))


def _unless(frozen: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns of each pair (old, new) the new tensor in the dtype of the old, or the old one where frozen."""
    new = tuple(new.to(old.dtype) for old, new in pairs)
    return new if frozen is None else tuple(torch.where(frozen, p[0], n) for p, n in zip(pairs, new, strict=True))
