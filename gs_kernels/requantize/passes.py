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
from gs_kernels.program.recording import ADD, CHANNELS_LAST, QUANTIZE, KernelCall, recording

PARALLEL_FROM = 1 << 15  # numbers of y, from which a second thread pays: measured

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


class _Codes(ctypes.Structure):
    _fields_ = [
        ("count", size),
        *((name, single) for name in ("inverse", "fraction", "whole", "least", "largest")),
        ("moved", number),
    ]


class _Sum(ctypes.Structure):
    _fields_ = [
        ("count", size),
        *((name, single) for name in ("a_scale", "a_zero", "b_scale", "b_zero")),
        *((name, single) for name in ("inverse", "fraction", "whole", "least", "largest")),
        *((name, number) for name in ("activation", "codes")),
    ]


class _Image(ctypes.Structure):
    _fields_ = [(name, size) for name in ("batch", "channels", "pixels")]


FUNCTIONS: dict[str, Sequence[Any]] = {
    "to_codes": (*[pointer] * 3, ctypes.c_int),
    "sum_codes": (*[pointer] * 4, ctypes.c_int),
    "lay_channels_last": (*[pointer] * 3, ctypes.c_int),
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
    run, parallel, fixed = functions.to_codes, count >= PARALLEL_FROM, _Codes(count, *grid, moved)
    at = ctypes.addressof(fixed)

    def quantize(x: Tensor) -> Tensor:
        y, threads = torch.empty_like(x, dtype=torch.int8), torch.get_num_threads() if parallel else 1
        run(at, x.data_ptr(), y.data_ptr(), threads)
        if recording.calls is not None:
            recording.calls.append(KernelCall(QUANTIZE, fixed, None, x, y, parallel=parallel))
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
    fixed = _Sum(0, *a, *(b or (1.0, 0.0)), *numbers, ACTIVATIONS[activation].cpp, grid is not None)

    def add(codes: Tensor, other: Tensor | None) -> Tensor:
        # naming the dtype that it has anyway takes a fifth of the time more
        y = torch.empty_like(codes, dtype=torch.float32) if to_floats else torch.empty_like(codes)
        params, count = _Sum.from_buffer_copy(fixed), codes.numel()
        params.count, parallel = count, count >= PARALLEL_FROM
        second = None if other is None else other.data_ptr()
        threads = torch.get_num_threads() if parallel else 1
        run(ctypes.addressof(params), codes.data_ptr(), second, y.data_ptr(), threads)
        if recording.calls is not None:
            recording.calls.append(KernelCall(ADD, params, None, codes, y, other, parallel=parallel))
        return y

    return add


def channels_last(codes: Tensor) -> Tensor:
    """Returns int8 images `[B, C, H, W]` in the memory format channels-last: themselves, or a copy."""
    if codes.is_contiguous(memory_format=torch.channels_last):
        return codes
    functions = kernels() if codes.is_contiguous() else None
    if functions is None:
        return codes.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(codes, memory_format=torch.channels_last)
    b, c, h, w = codes.shape
    fixed, parallel = _Image(b, c, h * w), codes.numel() >= PARALLEL_FROM
    threads = torch.get_num_threads() if parallel else 1
    functions.lay_channels_last(ctypes.addressof(fixed), codes.data_ptr(), y.data_ptr(), threads)
    if recording.calls is not None:
        recording.calls.append(KernelCall(CHANNELS_LAST, fixed, None, codes, y, parallel=parallel))
    return y


@cache
def kernels() -> Any:
    """Returns the library, or None if its passes over codes do not run here; the log says why."""
    return load_functions("passes over 8-bit codes", FUNCTIONS, self_test, (_Codes, _Sum, _Image))


def self_test(functions: Any) -> bool:
    """Checks one small pass of each kind."""
    x = (torch.arange(401) * 37 % 256 - 128).to(torch.int8)
    back, added = torch.empty_like(x), torch.empty(401)
    real = x.float() - 5
    grid = _Codes(401, 0.5, 0.0, -20.0, -100.0, 90.0, 1)
    functions.to_codes(ctypes.addressof(grid), real.data_ptr(), back.data_ptr(), 1)
    codes = (real * 0.5).round().sub(20).clamp(-100, 90).add(1).to(torch.int8)
    params = _Sum(401, 0.5, 3.0, 0.25, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 0)
    functions.sum_codes(ctypes.addressof(params), x.data_ptr(), back.data_ptr(), added.data_ptr(), 1)
    turned, image = torch.empty(5, 10, 7, dtype=torch.int8), _Image(5, 7, 10)
    functions.lay_channels_last(ctypes.addressof(image), x.data_ptr(), turned.data_ptr(), 1)
    want = ((x.float() - 3) * 0.5 + (codes.float() + 2) * 0.25).relu()
    laid = torch.equal(turned, x[:350].view(5, 7, 10).transpose(1, 2))
    return torch.equal(back, codes) and torch.equal(added, want) and laid
