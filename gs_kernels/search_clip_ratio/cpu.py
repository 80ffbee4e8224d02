"""Searches clip ratios on the CPU by `cpu.cpp`, or by the reference where that does not compile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.observe.ref import symmetric_zero
from gs_kernels.search_clip_ratio.ref import search_clip_ratio_ref

PARALLEL_FROM = 1 << 18  # errors, from which a second thread pays

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p


class _Search(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("found", "x", "importance", "ratios")),
        *((name, size) for name in ("channels", "n", "count")),
        *((name, number) for name in ("qmin", "qmax", "symmetric")),
        *(("zero", single), ("threads", number)),
    ]


FUNCTIONS: dict[str, Sequence[Any]] = {"search_clip_ratio": (ctypes.POINTER(_Search),)}


@cache
def kernels() -> Any:
    """Returns the functions of `cpu.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("search_clip_ratio", FUNCTIONS, _self_test, (_Search,))


def _self_test(functions: Any) -> bool:
    """Compares some rows with the reference, whose best ratios are far from others."""
    x = torch.linspace(-20, 31, 3 * 37).sin().view(3, 37)
    x[1, 5], x[2, 7] = 4.0, -9.0
    ratios = torch.tensor([1.0, 0.7, 0.4, 0.2])
    want = search_clip_ratio_ref(x, ratios, qmin=0, qmax=7, symmetric=False)
    return torch.equal(_run(functions, x, ratios, None, 0, 7, False), want)


def _run(
    functions: Any, x: Tensor, ratios: Tensor, importance: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    found = x.new_empty(len(x), dtype=torch.float32)
    threads = torch.get_num_threads() if x.numel() * len(ratios) >= PARALLEL_FROM else 1
    pointers = (None if t is None else t.data_ptr() for t in (found, x, importance, ratios))
    zero = symmetric_zero(qmin, qmax) if symmetric else 0.0
    functions.search_clip_ratio(_Search(*pointers, *x.shape, len(ratios), qmin, qmax, symmetric, zero, threads))
    return found


def search_clip_ratio_cpu(
    x: Tensor, ratios: Tensor, importance: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    functions = kernels()
    if functions is None:
        return search_clip_ratio_ref(x, ratios, importance, qmin=qmin, qmax=qmax, symmetric=symmetric)
    return _run(functions, x.float(), ratios, importance, qmin, qmax, symmetric)
