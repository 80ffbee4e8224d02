"""Calls `cpu.cpp`: passes over 8-bit codes, from floats to codes and from sums of codes to codes or floats."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.cpu.library import load_functions

PARALLEL_FROM = 1 << 15  # numbers of y, from which a second thread pays: measured

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


class _Sum(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("a", "b")),
        *((name, single) for name in ("a_scale", "a_zero", "b_scale", "b_zero")),
        *((name, single) for name in ("inverse", "fraction", "whole", "least", "largest")),
        *((name, number) for name in ("activation", "codes")),
    ]


FUNCTIONS: dict[str, Sequence[Any]] = {
    "to_codes": (pointer, pointer, size, *[single] * 5, ctypes.c_int, ctypes.c_int),
    "sum_codes": (ctypes.POINTER(_Sum), pointer, size, ctypes.c_int),
}


def to_codes_of(count: int, grid: Sequence[float], moved: int) -> Callable[[Tensor], Tensor] | None:
    """Returns the function that quantizes dense fp32 tensors of so many elements on one grid to int8 codes, in order.

    grid: inverse of the scale, fraction and whole part of the zero point, least and largest code.
    moved: added to them.
    None if the C++ does not run.
    """
    functions = kernels()
    if functions is None:
        return None
    run, parallel = functions.to_codes, count >= PARALLEL_FROM

    def quantize(x: Tensor) -> Tensor:
        y, threads = torch.empty_like(x, dtype=torch.int8), torch.get_num_threads() if parallel else 1
        run(x.data_ptr(), y.data_ptr(), count, *grid, moved, threads)
        return y

    return quantize


def sum_codes_of(
    a: tuple[float, float], b: tuple[float, float] | None, activation: str, grid: Sequence[float] | None
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Returns the function that computes `act(a + b)` of dense int8 codes in one order: fp32, or codes.

    a, b: scale and zero point of each; b: None if nothing is added. grid: as `to_codes_of` takes it.
    None if the C++ does not run, or does not know the activation.
    """
    functions = kernels()
    if functions is None or ACTIVATIONS[activation].cpp is None:
        return None
    run, to_floats = functions.sum_codes, grid is None
    numbers = (0.0, 0.0, 0.0, 0.0, 0.0) if grid is None else grid
    fixed = _Sum(None, None, *a, *(b or (1.0, 0.0)), *numbers, ACTIVATIONS[activation].cpp, grid is not None)

    def add(codes: Tensor, other: Tensor | None) -> Tensor:
        # naming the dtype that it has anyway takes a fifth of the time more
        y = torch.empty_like(codes, dtype=torch.float32) if to_floats else torch.empty_like(codes)
        params, count = _Sum.from_buffer_copy(fixed), codes.numel()
        params.a, params.b = codes.data_ptr(), None if other is None else other.data_ptr()
        run(params, y.data_ptr(), count, torch.get_num_threads() if count >= PARALLEL_FROM else 1)
        return y

    return add


@cache
def kernels() -> Any:
    """Returns the library, or None if its passes over codes do not run here; the log says why."""
    return load_functions("passes over 8-bit codes", FUNCTIONS, self_test, (_Sum,))


def self_test(functions: Any) -> bool:
    """Checks one small pass of each kind."""
    x = (torch.arange(401) * 37 % 256 - 128).to(torch.int8)
    back, added = torch.empty_like(x), torch.empty(401)
    real = x.float() - 5
    functions.to_codes(real.data_ptr(), back.data_ptr(), 401, 0.5, 0.0, -20.0, -100.0, 90.0, 1, 1)
    codes = (real * 0.5).round().sub(20).clamp(-100, 90).add(1).to(torch.int8)
    params = _Sum(x.data_ptr(), back.data_ptr(), 0.5, 3.0, 0.25, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 0)
    functions.sum_codes(params, added.data_ptr(), 401, 1)
    want = ((x.float() - 3) * 0.5 + (codes.float() + 2) * 0.25).relu()
    return torch.equal(back, codes) and torch.equal(added, want)
