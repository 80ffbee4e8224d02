"""Runs SLB on the CPU by `cpu.cpp`, or by the reference where that does not compile."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.huge_pages import in_huge_pages
from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.pack import pack_codes
from gs_kernels.slb.memory_format import empty_weight
from gs_kernels.slb.ref import (
    TAU_MAX,
    TAU_MIN,
    slb_adamw_ref,
    slb_pack_ref,
    slb_sgd_ref,
    slb_weight_backward_ref,
    slb_weight_ref,
)

PARALLEL_FROM = 1 << 13  # logits, from which a second thread pays: measured
TILE = 128  # columns: of cpu.cpp

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p


class _Array(ctypes.Structure):
    _fields_ = [("data", pointer), ("is_bf16", size)]


class _Logits(ctypes.Structure):
    _fields_ = [
        *(("a", _Array), ("levels", pointer), ("scale", pointer)),
        *((name, size) for name in ("rows", "planes", "columns")),
        *(("inverse", single), ("threads", number)),
    ]


class _AdamW(ctypes.Structure):
    _fields_ = [(name, single) for name in ("weight1", "weight2", "rate", "spread", "eps", "keep")]


class _SGD(ctypes.Structure):
    _fields_ = [*((name, single) for name in ("rate", "decay", "momentum")), ("nesterov", number)]


_LOGITS, _ARRAY = ctypes.POINTER(_Logits), ctypes.POINTER(_Array)
FUNCTIONS: dict[str, Sequence[Any]] = {
    "slb_weight": (_LOGITS, _ARRAY, number),
    "slb_codes": (_LOGITS, pointer),
    "slb_backward": (_LOGITS, _ARRAY, _ARRAY, pointer),
    "slb_adamw": (_LOGITS, _ARRAY, _ARRAY, _ARRAY, ctypes.POINTER(_AdamW)),
    "slb_sgd": (_LOGITS, _ARRAY, _ARRAY, ctypes.POINTER(_SGD)),
}


@cache
def kernels() -> Any:
    """Returns the functions of `cpu.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("slb", FUNCTIONS, _self_test, (_Array, _Logits, _AdamW, _SGD))


def _self_test(functions: Any) -> bool:
    """Compares one small weight with the reference."""
    logits, levels = torch.linspace(-3, 2, 3 * 5 * 20).cos().view(3, 5, 20), torch.linspace(-1, 1, 5)
    w, tau = torch.empty(3, 20), torch.full((1,), 0.3)
    functions.slb_weight(_logits(logits, levels, tau, None), _array(w), False)
    return torch.allclose(w, slb_weight_ref(logits, levels, tau), atol=1e-6)


def _array(t: Tensor | None) -> _Array:
    """Makes the struct of a contiguous tensor, fp32 or bf16."""
    return _Array(None, 0) if t is None else _Array(t.data_ptr(), t.dtype == torch.bfloat16)


def _readable(t: Tensor) -> Tensor:
    """Returns t, or a copy, of a dtype and layout that `_array` takes."""
    return (t.float() if t.dtype == torch.float16 else t).contiguous()


def _logits(a: Tensor, levels: Tensor, temperature: Tensor, scale: Tensor | None) -> _Logits:
    rows, planes = a.shape[:2]
    columns = a.numel() // (rows * planes)
    tau = temperature.item()
    inverse = 1 / tau if TAU_MIN <= tau <= TAU_MAX else math.nan
    threads = torch.get_num_threads() if a.numel() >= PARALLEL_FROM else 1
    levels, scale = levels.contiguous(), None if scale is None else scale.contiguous()
    pointers = levels.data_ptr(), None if scale is None else scale.data_ptr()
    struct = _Logits(_array(a), *pointers, rows, planes, columns, inverse, threads)
    struct.held = a, levels, scale  # for as long as their addresses
    return struct


def _rows(dw: Tensor) -> Tensor:
    return _readable(dw.reshape(dw.shape[0], -1))


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
    functions = kernels()
    if functions is None:
        w = slb_weight_ref(logits, levels, temperature, scale, hard=hard, shape=shape, dtype=dtype)
    else:
        made = torch.float32 if dtype == torch.float16 else dtype
        w = in_huge_pages(logits.new_empty(shape, dtype=made))
        functions.slb_weight(_logits(_readable(logits), levels, temperature, scale), _array(w), hard)
    return w.to(dtype) if not channels_last else empty_weight(logits, shape, dtype, True).copy_(w)


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
    functions = kernels()
    if hard or functions is None:
        dlogits, dscale = slb_weight_backward_ref(dw, logits, levels, temperature, scale, hard=hard)
        da = dlogits.contiguous() if for_logits else logits.new_empty(0)
        return da, dscale if for_scale else dw.new_empty(0, dtype=torch.float32)
    a, dw = _readable(logits), _rows(dw)
    out = in_huge_pages(torch.empty_like(a)) if for_logits else None
    sums = a.new_empty(a.shape[0], -(-dw.shape[1] // TILE), dtype=torch.float32) if for_scale else None
    where = None if sums is None else sums.data_ptr()
    functions.slb_backward(_logits(a, levels, temperature, scale), _array(dw), _array(out), where)
    da = logits.new_empty(0) if out is None else out.to(logits.dtype)
    return da, a.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(1)


def slb_pack_cpu(logits: Tensor, bits: int) -> Tensor:
    functions = kernels()
    if functions is None:
        return slb_pack_ref(logits, bits=bits)
    a = _readable(logits)
    unused, one = a.new_zeros(max(2, logits.shape[1]), dtype=torch.float32), a.new_ones(1, dtype=torch.float32)
    codes = a.new_empty(a.shape[0], a.shape[2:].numel(), dtype=torch.uint8)
    functions.slb_codes(_logits(a, unused, one, None), codes.data_ptr())
    return codes if bits == 8 else pack_codes(codes, bits)


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
    lr, t = lr if lr_tensor is None else lr_tensor.item(), step.item()
    if not t >= 1:
        raise ValueError(f"slb_adamw_: step must be the number of this step, 1 for the first, got {t}; count it before")
    state, functions = (logits, exp_avg, exp_avg_sq), kernels()
    if functions is None:
        kwargs: dict[str, Any] = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        _assign(state, slb_adamw_ref(logits, dw, levels, temperature, exp_avg, exp_avg_sq, step, scale, **kwargs))
        return
    rate, spread = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
    by = _AdamW(1 - beta1, 1 - beta2, rate, spread, eps, 1 - lr * weight_decay)
    dw = _rows(dw)
    a, avg, sq = new = [_readable(t) for t in state]
    functions.slb_adamw(_logits(a, levels, temperature, scale), _array(dw), _array(avg), _array(sq), by)
    _assign(state, new)


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
    state, functions = (logits,) if momentum_buffer is None else (logits, momentum_buffer), kernels()
    if functions is None:
        kwargs: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        _assign(state, slb_sgd_ref(logits, dw, levels, temperature, momentum_buffer, scale, **kwargs))
        return
    dw = _rows(dw)
    new = [_readable(t) for t in state]
    buffer = _array(new[1]) if len(new) > 1 else _array(None)
    functions.slb_sgd(
        _logits(new[0], levels, temperature, scale), _array(dw), buffer, _SGD(lr, weight_decay, momentum, nesterov)
    )
    _assign(state, new)


def _assign(state: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for old, value in zip(state, new, strict=True):
        if value is not old:
            old.copy_(value)
