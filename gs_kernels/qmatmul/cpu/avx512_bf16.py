"""Multiplies bf16 rows with a row-interleaved weight, in C++ for CPUs with AVX-512 dot products of bf16.

What a compiler makes of tensor operations rounds each weight to bf16 in eight instructions and goes through memory
before it multiplies. avx512_bf16.cpp rounds 32 of them with one and multiplies them while they are in the cache.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.qmatmul.cpu.interleaved import LANES, InterleavedWeight
from gs_kernels.runtime.instructions import has

REQUIRED_ISA = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vbmi")
FEW_ROWS_OF_AMX = 32  # above, the matrix unit that ATen uses should make up for the passes over memory; not measured


def supports(m: int) -> bool:
    """Says whether this CPU has the instructions, and none that multiply so many rows faster through ATen."""
    able, matrix_unit = _abilities()
    return able and (m <= FEW_ROWS_OF_AMX or not matrix_unit)


@cache
def _abilities() -> tuple[bool, bool]:
    return all(map(has, REQUIRED_ISA)), has("amx_bf16")


def multiply(x: Tensor, weight: InterleavedWeight) -> Tensor:
    """Multiplies bf16 x `[M, K]` with the weight, rounded once to bf16; returns fp32 `[M, 16 * B]`.

    Raises:
        UnsuitableError: if the C++ does not compile here, or computes something else; the log says so once.
    """
    functions = kernels()
    if functions is None:
        raise UnsuitableError("avx512_bf16.cpp does not run")
    return _call(functions, x, weight)


def _call(functions: Any, x: Tensor, weight: InterleavedWeight) -> Tensor:
    steps = weight.steps(x).contiguous()
    y = torch.empty(x.shape[0], weight.codes.shape[0] * LANES)
    pointers = steps.data_ptr(), x.shape[0], weight.codes.data_ptr(), weight.grid.data_ptr()
    functions.qmatmul_bf16(*pointers, *weight.codes.shape[:3], weight.bits, y.data_ptr(), torch.get_num_threads())
    return y


@cache
def kernels() -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    argtypes = [pointer, size, pointer, pointer, size, size, size, ctypes.c_int, pointer, ctypes.c_int]
    return load_functions("qmatmul of bfloat16", {"qmatmul_bf16": argtypes}, self_test)


def self_test(functions: Any) -> bool:
    """Compares one small product, exact in bf16, with the same product by torch."""
    codes = torch.arange(3 * 2 * 4 * 64, dtype=torch.int32).mul(37).to(torch.uint8).view(3, 2, 4, 64)
    grid = torch.tensor([0.5, 3.0]).repeat_interleave(LANES).repeat(3, 2, 1)
    x = (torch.arange(5 * 64) % 7 - 3).view(5, 64).to(torch.bfloat16)
    fields = torch.stack((codes & 15, codes >> 4), -1).view(3, 8, 4, LANES, 2)  # [block, step, byte, row, code]
    dense = fields.permute(0, 3, 1, 2, 4).reshape(3 * LANES, 64).float().sub(3).mul(0.5)
    return torch.equal(_call(functions, x, InterleavedWeight(codes, grid, 4, (48, 64), 32)), x.float() @ dense.T)
