"""Multiplies bf16 rows with a row-interleaved weight, in C++ for CPUs with AVX-512 dot products of bf16.

avx512_bf16.cpp multiplies codes, which bf16 holds exactly, while they are in a register; no weight is rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from gs_kernels.cpu.library import load_functions
from gs_kernels.qmatmul.cpu.interleaved import LANES, InterleavedWeight
from gs_kernels.qmatmul.cpu.interleaved_product import PRODUCT, bind, fixed_product
from gs_kernels.runtime.instructions import has, instruction_set

FUNCTIONS = {"bf16_product": PRODUCT}
FEW_ROWS_OF_AMX = 32  # above, the matrix unit that ATen uses should make up for the passes over memory; not measured


def supports(m: int) -> bool:
    """Says whether this CPU has the instructions, and none that multiply so many rows faster through ATen."""
    able, matrix_unit = _abilities()
    return able and (m <= FEW_ROWS_OF_AMX or not matrix_unit)


@cache
def _abilities() -> tuple[bool, bool]:
    return instruction_set() == "avx512_vnni" and has("avx512_bf16"), has("amx_bf16")


@cache
def kernels() -> Any:
    return load_functions("qmatmul of bfloat16", FUNCTIONS, self_test)


def self_test(functions: Any) -> bool:
    """Compares small products, exact in bf16, with the same products by torch."""
    codes = torch.arange(3 * 2 * 4 * LANES).mul(0x2545F491).to(torch.int32).view(3, 2, 4, LANES)
    grid = torch.tensor([0.5, 3.0]).repeat_interleave(LANES).repeat(3, 2, 1)
    x = (torch.arange(19 * 64) % 7 - 3).view(19, 64).to(torch.bfloat16)
    shifts = torch.tensor([16 * (j % 2) + 4 * (j // 2) for j in range(8)])
    fields = (codes.unsqueeze(-1) >> shifts & 15).permute(0, 3, 1, 2, 4)  # [block, row, group, word, code]
    dense = fields.reshape(3 * LANES, 64).float().sub(3).mul(0.5)
    weight = InterleavedWeight(codes, grid, 4, (48, 64), 32)
    product = fixed_product(weight, torch.bfloat16, torch.float32)
    multiply = bind(functions.bf16_product, product, x.shape, torch.float32, weight)
    return torch.equal(multiply(x), x.float() @ dense.T)
