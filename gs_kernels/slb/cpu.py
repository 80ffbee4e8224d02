"""SLB on the CPU: compiled passes over blocks of rows, whose logits are still in the cache when they are read again.

A pass names every level, so that a weight's logits and their exponentials live in vector registers. Small weights run
as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gs_kernels.compiled import Chain, call, compiled
from gs_kernels.pack.pack import pack_codes
from gs_kernels.slb.layout import empty_weight
from gs_kernels.slb.ref import (
    TAU_MAX,
    TAU_MIN,
    slb_adamw_ref,
    slb_pack_ref,
    slb_sgd_ref,
    slb_weight_backward_ref,
    slb_weight_ref,
)

COMPILE_FROM = 1 << 16  # logits; below, an eager chain costs less than the wait for a compiler could win back
CHUNK = 16  # levels named in one pass; more are mixed chunk by chunk
BLOCK_BYTES = 1 << 24  # logits of a block of rows: few blocks, each within a last-level cache
ROWS, COLUMNS = 37, 4099  # of an example


def mix_chain(a: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits `[O, L, R]` the largest, the sum of exp((a - m) * c) and the same sum weighted with the levels."""
    planes = [p.float() for p in a.unbind(1)]
    if len(planes) == 1:
        planes = [torch.zeros_like(planes[0]), planes[0]]
    m = planes[0].clamp(min=-TAU_MAX)
    for p in planes[1:]:
        m = torch.maximum(m, p)
    s, acc = torch.zeros_like(m), torch.zeros_like(m)
    for k, p in enumerate(planes):
        e = ((p - m) * c).exp()
        s, acc = s + e, acc + e * v[k]
    return m, s, acc


def more_chain(a: Tensor, v: Tensor, c: Tensor, m: Tensor, s: Tensor, acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of further levels."""
    top, more, weighted = mix_chain(a, v, c)
    largest = torch.maximum(m, top)
    old, new = ((m - largest) * c).exp(), ((top - largest) * c).exp()
    return largest, s * old + more * new, acc * old + weighted * new


def weight_chain(w: Tensor, a: Tensor, v: Tensor, c: Tensor, scale: Tensor) -> None:
    _, s, acc = mix_chain(a, v, c)
    w.copy_(acc / s * scale)


def slope_chain(dw: Tensor, a: Tensor, v: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, W_c and g, of which `gradient` makes the gradient of any logit."""
    m, s, acc = mix_chain(a, v, c)
    return m, acc / s, dw.float() * scale * c / s


def gradient(a: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """dW * scale * P * (v - W_c) / tau. A single plane of logits is that of level 1."""
    v = v[-a.shape[1] :].view(1, -1, 1)
    return g.unsqueeze(1) * ((a.float() - m.unsqueeze(1)) * c).exp() * (v - w.unsqueeze(1))


def gradient_chain(da: Tensor, a: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor) -> None:
    da.copy_(gradient(a, v, c, m, w, g))


def adamw_chain(
    a: Tensor, avg: Tensor, sq: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor
) -> None:
    """hyper: 1 - beta1, 1 - beta2, lr / correction1, sqrt(correction2), eps, 1 - lr * weight_decay."""
    da = gradient(a, v, c, m, w, g)
    avg_new = avg.float() * (1 - hyper[0]) + da * hyper[0]
    sq_new = sq.float() * (1 - hyper[1]) + da * da * hyper[1]
    a.copy_(a.float() * hyper[5] - hyper[2] * avg_new / (sq_new.sqrt() / hyper[3] + hyper[4]))
    avg.copy_(avg_new)
    sq.copy_(sq_new)


def sgd_chain(
    a: Tensor, buf: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor, nesterov: bool
) -> None:
    """hyper: lr, weight_decay, momentum."""
    da = gradient(a, v, c, m, w, g) + hyper[1] * a.float()
    buf_new = hyper[2] * buf.float() + da
    a.copy_(a.float() - hyper[0] * (da + hyper[2] * buf_new if nesterov else buf_new))
    buf.copy_(buf_new)


def plain_sgd_chain(a: Tensor, v: Tensor, c: Tensor, m: Tensor, w: Tensor, g: Tensor, hyper: Tensor) -> None:
    da = gradient(a, v, c, m, w, g) + hyper[1] * a.float()
    a.copy_(a.float() - hyper[0] * da)


def pick_chain(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The code of the largest logit, uint8, and its level, NaN if a logit is."""
    planes = list(a.unbind(1))
    if len(planes) == 1:
        planes = [torch.zeros_like(planes[0]), planes[0]]
    nan = planes[0].isnan()
    best = torch.where(nan, torch.inf, planes[0])
    code = torch.zeros_like(best, dtype=torch.int32)
    level = v[0].expand(best.shape)
    for k, p in enumerate(planes[1:], 1):
        is_nan = p.isnan()
        nan = nan | is_nan
        p = torch.where(is_nan, torch.inf, p)
        better = p > best
        code = torch.where(better, k, code)
        level = torch.where(better, v[k], level)
        best = torch.maximum(best, p)
    return code.to(torch.uint8), torch.where(nan, torch.nan, level)


def _worth_compiling(logits: Tensor) -> bool:
    # the compiler makes code of its own for sizes of 1
    return logits.numel() >= COMPILE_FROM and logits.shape[0] > 1 and logits[0, 0].numel() > 1


def _run(chain: Chain, *args: Any) -> Any:
    """The compiled chain on args: tensors `[O, P, R]`, `[O, R]`, `[O, 1]` and small vectors, and flags."""
    variant = tuple(_kind(a) if isinstance(a, Tensor) else a for a in args)
    return call(compiled(chain, variant, lambda: tuple(_example(a) for a in args)), *args)


def _kind(t: Tensor) -> tuple[Any, ...]:
    planes = t.shape[1] if t.dim() == 3 else 0
    return t.dtype, t.dim(), planes, t.numel() if t.dim() == 1 else 0, t.shape[-1] == 1, t.is_contiguous()


def _example(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.dim() == 1:
        return t
    if t.dim() == 2:
        return torch.ones(ROWS, 1 if t.shape[1] == 1 else COLUMNS, dtype=t.dtype)
    planes = t.shape[1]
    return torch.zeros(ROWS, planes if t.is_contiguous() else 2 * planes, COLUMNS, dtype=t.dtype)[:, :planes]


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that fit the cache: as many for each thread, and never a single one."""
    o, planes, r = logits.shape
    threads = torch.get_num_threads()
    wanted = BLOCK_BYTES // (planes * r * logits.element_size())
    rows = max(2, threads, wanted // threads * threads)
    start = 0
    while start < o:
        stop = start + rows if o - start - rows > 1 else o
        yield slice(start, stop)
        start = stop


def _mix(a: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-a.shape[1] // CHUNK)
    state: tuple[Tensor, ...] = ()
    for part, levels in zip(a.tensor_split(chunks, 1), v.tensor_split(chunks), strict=True):
        state = _run(more_chain if state else mix_chain, part, levels, c, *state)
    m, s, acc = state
    return m, s, acc


def _slope(dw: Tensor, a: Tensor, v: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.shape[1] <= CHUNK:
        m, w, g = _run(slope_chain, dw, a, v, c, scale)
        return m, w, g
    m, s, acc = _mix(a, v, c)
    return m, acc.div_(s), (c / s).mul_(scale).mul_(dw)


def _inverse(temperature: Tensor) -> Tensor:
    return torch.where((temperature >= TAU_MIN) & (temperature <= TAU_MAX), 1.0 / temperature, torch.nan)


def _column(scale: Tensor | None, rows: int) -> Tensor:
    return torch.ones(rows, 1) if scale is None else scale.view(-1, 1)


def slb_weight_cpu(
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    shape: Sequence[int],
    hard: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    if not _worth_compiling(logits) or (hard and logits.shape[1] > CHUNK):
        w = slb_weight_ref(logits, levels, temperature, scale, hard=hard, shape=shape, dtype=dtype)
        return w if not channels_last else empty_weight(logits, shape, dtype, True).copy_(w)
    a = logits.contiguous().flatten(2)
    out = torch.empty(shape, dtype=dtype)
    rows, column = out.view(a.shape[0], -1), _column(scale, a.shape[0])
    if hard:
        torch.mul(_run(pick_chain, a, levels)[1], column, out=rows)
    elif a.shape[1] <= CHUNK:
        _run(weight_chain, rows, a, levels, _inverse(temperature), column)
    else:
        for block in _blocks(a):
            _, s, acc = _mix(a[block], levels, _inverse(temperature))
            rows[block] = acc.div_(s).mul_(column[block])
    return out if not channels_last else empty_weight(logits, shape, dtype, True).copy_(out)


def slb_weight_backward_cpu(
    dw: Tensor,
    logits: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    hard: bool,
    for_logits: bool,
    for_scale: bool,
) -> tuple[Tensor, Tensor]:
    o = logits.shape[0]
    da = torch.empty_like(logits, memory_format=torch.contiguous_format) if for_logits else logits.new_empty(0)
    dscale = torch.empty(o if for_scale else 0)
    if hard or not _worth_compiling(logits):
        found = slb_weight_backward_ref(dw, logits, levels, temperature, scale, hard=hard)
        return found[0] if for_logits else da, found[1] if for_scale else dscale
    a, g, column, c = logits.contiguous().flatten(2), dw.reshape(o, -1), _column(scale, o), _inverse(temperature)
    for block in _blocks(a):
        m, w, slope = _slope(g[block], a[block], levels, c, column[block])
        if for_scale:
            torch.sum(w * g[block], 1, out=dscale[block])
        if for_logits:
            _run(gradient_chain, da.flatten(2)[block], a[block], levels, c, m, w, slope)
    return da, dscale


def slb_pack_cpu(logits: Tensor, bits: int) -> Tensor:
    if not _worth_compiling(logits) or logits.shape[1] > CHUNK:
        return slb_pack_ref(logits, bits=bits)
    levels = torch.zeros(max(2, logits.shape[1]))
    return pack_codes(_run(pick_chain, logits.contiguous().flatten(2), levels)[0], bits)


def slb_adamw__cpu(
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
    if frozen is not None and frozen.item():
        return
    lr = lr if lr_tensor is None else lr_tensor.item()
    state = (logits, exp_avg, exp_avg_sq)
    if not _worth_compiling(logits):
        kwargs: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        new = slb_adamw_ref(logits, dw, levels, temperature, exp_avg, exp_avg_sq, step, scale, **kwargs)
        _assign(state, new)
        return
    t = step.item()
    rate, spread = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
    hyper = torch.tensor([1 - beta1, 1 - beta2, rate, spread, eps, 1 - lr * weight_decay])
    _update(adamw_chain, state, dw, levels, temperature, scale, hyper)


def slb_sgd__cpu(
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
    if frozen is not None and frozen.item():
        return
    lr = lr if lr_tensor is None else lr_tensor.item()
    state = (logits,) if momentum_buffer is None else (logits, momentum_buffer)
    if not _worth_compiling(logits):
        kwargs: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        _assign(state, slb_sgd_ref(logits, dw, levels, temperature, momentum_buffer, scale, **kwargs))
        return
    hyper = torch.tensor([lr, weight_decay, momentum])
    if momentum_buffer is None:
        _update(plain_sgd_chain, state, dw, levels, temperature, scale, hyper)
    else:
        _update(sgd_chain, state, dw, levels, temperature, scale, hyper, nesterov)


def _assign(state: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for old, value in zip(state, new, strict=True):
        old.copy_(value)


def _update(
    chain: Chain,
    state: Sequence[Tensor],
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    *hyper: Any,
) -> None:
    a, *others = (t.flatten(2) for t in state)
    g, column, c = dw.reshape(a.shape[0], -1), _column(scale, a.shape[0]), _inverse(temperature)
    for block in _blocks(a):
        slope = _slope(g[block], a[block], levels, c, column[block])
        _run(chain, a[block], *(t[block] for t in others), levels, c, *slope, *hyper)
