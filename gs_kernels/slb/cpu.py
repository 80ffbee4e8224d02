"""SLB on the CPU: compiled passes over blocks of rows, whose logits are still in a cache when they are read again.

Small weights run as the reference.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gs_kernels.compiled import Chain, call, compiled
from gs_kernels.pack.pack import pack_codes
from gs_kernels.slb.chains import (
    adamw_chain,
    at_once,
    gradient_chain,
    mix_chain,
    more_chain,
    pick_chain,
    plain_sgd_chain,
    sgd_chain,
    slope_chain,
    weight_chain,
)
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

COMPILE_FROM = 1 << 14  # logits; below, eager operations cost little more than calls of compiled code
CHUNK = 16  # levels named in one pass; more are mixed chunk by chunk
BLOCK_BYTES = 1 << 22  # logits of a block of rows
HUGE_FROM = 1 << 22  # bytes
ROWS, COLUMNS = 37, 4099  # of an example
LOG2E = 1.4426950408889634


def _worth_compiling(logits: Tensor) -> bool:
    # the compiler makes code of its own for sizes of 1
    return logits.numel() >= COMPILE_FROM and logits.shape[0] > 1 and logits.shape[2:].numel() > 1


def _in_huge_pages(t: Tensor) -> Tensor:
    """t, just allocated; if large, Linux is advised to map it in huge pages.

    The faults of a fresh tensor's 4 KB pages take longer than the passes that write it. `THP_MEM_ALLOC_ENABLE=1` makes
    torch do the same for every tensor.
    """
    if sys.platform == "linux" and t.nbytes >= HUGE_FROM:
        first = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = t.data_ptr() + t.nbytes - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return t


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


def _chunks(a: Tensor, v: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Logits and levels in parts of about equal size, of at most CHUNK levels."""
    chunks = -(-a.shape[1] // CHUNK)
    return a.tensor_split(chunks, 1), v.tensor_split(chunks)


def _mix(a: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state: tuple[Tensor, ...] = ()
    for part, levels in zip(*_chunks(a, v), strict=True):
        state = _run(more_chain if state else mix_chain, part, levels, c, *state)
    m, s, acc = state
    return m, s, acc


def _pick(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Code and level of the largest logit."""
    parts, levels = _chunks(a, v)
    best, code, level = _run(pick_chain, parts[0], levels[0])
    first = parts[0].shape[1]
    for part, values in zip(parts[1:], levels[1:], strict=True):
        top, among, its = _run(pick_chain, part, values)
        better = top > best
        code = torch.where(better, among + first, code)
        level = torch.where(better | its.isnan(), its, level)
        best = torch.maximum(best, top)
        first += part.shape[1]
    return code, level


def _factors(dw: Tensor, a: Tensor, temperature: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dW as `[O, R]`, rate and c of the chains."""
    inverse = _inverse(temperature)
    return dw.reshape(a.shape[0], -1), _column(scale, a.shape[0]) * _numbers(inverse), _numbers(inverse * LOG2E)


def _use_slopes(
    chain: Chain,
    tensors: Sequence[Tensor],
    dw: Tensor,
    levels: Tensor,
    temperature: Tensor,
    scale: Tensor | None,
    *rest: Any,
) -> None:
    """Runs a chain of `gradient` on tensors `[O, L, R]`, logits first."""
    a = tensors[0]
    if a.nbytes <= BLOCK_BYTES and a.shape[1] <= CHUNK:
        dw, rate, c = _factors(dw, a, temperature, scale)
        _run(at_once(chain, len(tensors)), dw, rate, *tensors, levels, c, *rest)
        return
    for block, slopes in _slopes(dw, a, levels, temperature, scale):
        _run(chain, *(t[block] for t in tensors), *slopes, *rest)


def _slopes(
    dw: Tensor, a: Tensor, v: Tensor, temperature: Tensor, scale: Tensor | None
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Blocks of rows and what `gradient` needs of each: v, c, m, W_c, g. The next block overwrites the last three."""
    planes, r = a.shape[1:]
    dw, rate, c = _factors(dw, a, temperature, scale)
    out: tuple[Tensor, ...] = ()
    for block in _blocks(a):
        if planes > CHUNK:
            m, s, acc = _mix(a[block], v, c)
            yield block, (v, c, m, acc.div_(s), (rate[block] / s).mul_(dw[block]))
            continue
        rows = block.stop - block.start
        # the last block may have one row more
        out = out or tuple(torch.empty(rows + 1, r) for _ in range(3))
        m, w, g = (t[:rows] for t in out)
        _run(slope_chain, m, w, g, dw[block], a[block], v, c, rate[block])
        yield block, (v, c, m, w, g)


def _inverse(temperature: Tensor) -> float:
    """1 / temperature, NaN if it is out of range."""
    tau = temperature.item()
    return 1 / tau if TAU_MIN <= tau <= TAU_MAX else math.nan


def _numbers(*values: float) -> Tensor:
    """fp32 `[n]`. `torch.tensor` takes several times longer, which a small weight feels."""
    return torch.frombuffer(array("f", values), dtype=torch.float32)


def _column(scale: Tensor | None, rows: int) -> Tensor:
    """A scale for each row, `[O, 1]`."""
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
    if not _worth_compiling(logits):
        w = slb_weight_ref(logits, levels, temperature, scale, hard=hard, shape=shape, dtype=dtype)
        return w if not channels_last else empty_weight(logits, shape, dtype, True).copy_(w)
    a = logits.contiguous().flatten(2)
    out = _in_huge_pages(torch.empty(shape, dtype=dtype))
    rows, column, c = (
        out.view(a.shape[0], -1),
        _column(scale, a.shape[0]),
        _numbers(_inverse(temperature) * LOG2E),
    )
    if hard:
        torch.mul(_pick(a, levels)[1], column, out=rows)
    elif a.shape[1] <= CHUNK:
        _run(weight_chain, rows, a, levels, c, column)
    else:
        for block in _blocks(a):
            _, s, acc = _mix(a[block], levels, c)
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
    da = _in_huge_pages(da)
    dscale = torch.empty(o if for_scale else 0)
    if hard or not _worth_compiling(logits):
        found = slb_weight_backward_ref(dw, logits, levels, temperature, scale, hard=hard)
        return found[0] if for_logits else da, found[1] if for_scale else dscale
    a = logits.contiguous().flatten(2)
    if for_scale:
        for block, slopes in _slopes(dw, a, levels, temperature, scale):
            torch.sum(slopes[3] * dw.reshape(o, -1)[block], 1, out=dscale[block])
            if for_logits:
                _run(gradient_chain, a[block], da.flatten(2)[block], *slopes)
    elif for_logits:
        _use_slopes(gradient_chain, (a, da.flatten(2)), dw, levels, temperature, scale)
    return da, dscale


def slb_pack_cpu(logits: Tensor, bits: int) -> Tensor:
    if not _worth_compiling(logits):
        return slb_pack_ref(logits, bits=bits)
    levels = torch.zeros(max(2, logits.shape[1]))
    return pack_codes(_pick(logits.contiguous().flatten(2), levels)[0], bits)


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
    hyper = _numbers(1 - beta1, 1 - beta2, rate, spread, eps, 1 - lr * weight_decay)
    _use_slopes(adamw_chain, _flat(state), dw, levels, temperature, scale, hyper)


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
    hyper = _numbers(lr, weight_decay, momentum)
    if momentum_buffer is None:
        _use_slopes(plain_sgd_chain, _flat(state), dw, levels, temperature, scale, hyper)
    else:
        _use_slopes(sgd_chain, _flat(state), dw, levels, temperature, scale, hyper, nesterov)


def _assign(state: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for old, value in zip(state, new, strict=True):
        old.copy_(value)


def _flat(state: Sequence[Tensor]) -> list[Tensor]:
    return [t.flatten(2) for t in state]
