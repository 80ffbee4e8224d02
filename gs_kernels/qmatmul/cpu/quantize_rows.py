"""Quantizes rows to int8 on a CPU: C++ (quantize_rows.cpp) reads each row once from memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import FLOATS, load_functions
from gs_kernels.qmatmul.ref import quantize_rows_ref

PARALLEL_FROM = 1 << 15  # elements, from which a second thread pays

_size, _pointer = ctypes.c_int64, ctypes.c_void_p
FUNCTIONS: dict[str, Sequence[Any]] = {
    "quantize_rows": (_pointer, _size, _size, _size, ctypes.c_int, _pointer, _pointer, ctypes.c_int)
}


def quantize_rows_cpu(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes `quantize_rows`; codes in fp8, which no CPU multiplies, as the reference does."""
    functions = kernels() if dtype == torch.int8 else None
    if functions is None:
        codes, scale = quantize_rows_ref(x, dtype=dtype)
        return codes.contiguous(), scale.contiguous()
    return _quantize(functions, x)


def _quantize(functions: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shape = x.shape
    codes, scale = x.new_empty(shape, dtype=torch.int8), x.new_empty(shape[:-1], dtype=torch.float32)
    k, m = shape[-1], scale.numel()
    rows = x if x.is_contiguous() else x.reshape(m, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    apart = k if rows.is_contiguous() else rows.stride(0)
    threads = torch.get_num_threads() if m * k >= PARALLEL_FROM else 1
    functions.quantize_rows(rows.data_ptr(), m, k, apart, FLOATS[x.dtype], codes.data_ptr(), scale.data_ptr(), threads)
    return codes, scale


@cache
def kernels() -> Any:
    """Returns the library, or None if this does not run here; the log says why."""
    return load_functions("quantize_rows", FUNCTIONS, self_test)


def self_test(functions: Any) -> bool:
    """Checks some rows of each dtype, of which one is zeros."""
    x = torch.arange(-100, 170).view(5, 54)[:, :51] * torch.tensor([0.7, -0.01, 0.0, 90.0, 3e-4]).unsqueeze(1)
    found = ((_quantize(functions, x.to(dtype)), quantize_rows_ref(x.to(dtype))) for dtype in FLOATS)
    return all(torch.equal(codes, want[0]) and torch.equal(scale, want[1]) for (codes, scale), want in found)
