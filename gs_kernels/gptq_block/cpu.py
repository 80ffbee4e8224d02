"""Rounds columns in turn on the CPU by `cpu.cpp`, or by the reference where that does not compile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.gptq_block.ref import gptq_block_ref

PARALLEL_FROM = 1 << 20  # products, from which a second thread pays

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("change", "values", "start", "factor", "scale", "zero")),
        *((name, size) for name in ("columns", "groups", "rows")),
        *(("least", single), ("largest", single), ("threads", number)),
    ]


FUNCTIONS: dict[str, Sequence[Any]] = {"gptq_block": (ctypes.POINTER(_Block),)}


@cache
def kernels() -> Any:
    """Returns the functions of `cpu.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("gptq_block", FUNCTIONS, _self_test, (_Block,))


def _self_test(functions: Any) -> bool:
    """Compares a small block with the reference."""
    values, start = torch.linspace(-3, 2, 2 * 11 * 35).cos().view(11, 1, 70), torch.zeros(11, 1, 70)
    factor, scale = torch.linspace(-1, 1, 121).view(1, 11, 11), torch.full((11, 1, 70), 0.1)
    zero = torch.full_like(scale, 3.0)
    want = gptq_block_ref(values, start, factor, scale, zero, qmin=0, qmax=7)
    return torch.equal(_run(functions, values, start, factor, scale, zero, 0, 7), want)


def _run(
    functions: Any,
    values: Tensor,
    start: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    change = torch.empty_like(values)
    threads = torch.get_num_threads() if values.numel() * len(values) >= PARALLEL_FROM else 1
    tensors = (change, values, start, factor, scale, zero)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    functions.gptq_block(_Block(*pointers, *values.shape, qmin, qmax, threads))
    return change


def gptq_block_cpu(
    values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    functions = kernels()
    if functions is None:
        return gptq_block_ref(values, start, factor, scale, zero, qmin=qmin, qmax=qmax)
    return _run(functions, values, start, factor, scale, zero, qmin, qmax)
