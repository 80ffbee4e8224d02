"""Lists what tests, the AOT gate and the benchmarks run of hadamard: shapes, tolerances, costs, launches.

A shape is `x` (sizes, the last is K), `block` (None: the largest), `signs` and `transposed`. x and signs hold whole
numbers: their sums are exact, in whatever order, and results are compared bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gs_kernels.fake_quant.spec import EXACT, launcher, meta
from gs_kernels.hadamard.matrices import factors, hadamard_block
from gs_kernels.hadamard.op import hadamard, hadamard_quantize_rows
from gs_kernels.hadamard.ref import hadamard_quantize_rows_ref, hadamard_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape

# sums of n random numbers in another order
GRAD_TOL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def shape(*x: int, block: int | None = None, signs: bool = True, transposed: bool = False) -> Shape:
    return {"x": x, "block": block, "signs": signs, "transposed": transposed, "axis": -1, "group": 0}


def _arguments(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple[Any, Any]:
    x = torch.randint(-8, 9, s["x"], generator=generator, device=device).to(dtype)
    if not s["signs"]:
        return x, None
    signs = torch.randint(0, 2, s["x"][-1:], generator=generator, device=device)
    return x, (2 * signs - 1).to(torch.int8)


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    kwargs = {"block": s["block"], "transposed": s["transposed"]}
    return Case(_arguments(s, dtype, device, generator), kwargs, (0,))


def make_rows(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return Case(_arguments(s, dtype, device, generator), {"block": s["block"]})


def _sums(s: Shape) -> int:
    """Counts the sums of each value: m of the small matrix, and one for each bit of the power of two behind it."""
    small, power = factors(s["block"] or hadamard_block(s["x"][-1])) or (1, 1)
    return small - 1 + power.bit_length() - 1


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=2 * n * dtype.itemsize + s["x"][-1], flops=n * (_sums(s) + 1))


def rows_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    nbytes = n * (dtype.itemsize + 1) + 4 * n // s["x"][-1] + s["x"][-1]
    return Cost(nbytes=nbytes, flops=n * (_sums(s) + 6))


def _aot(name: str, op: str, k: int, *args: Any, block: int = 0, **bounds: Any) -> AotCase:
    call = launcher(op, "hadamard", meta(2048, k), meta(k, dtype=torch.int8), block or k, *args)
    return AotCase(name, call, **bounds)


_NVIDIA = ("sm_90",)
AOT = (
    _aot("4096-bf16", "hadamard", 4096, False, elements=4096, max_instructions=32),
    _aot("14336-bf16", "hadamard", 14336, True, elements=16384, targets=_NVIDIA),
)
ROWS_AOT = (
    _aot("4096-bf16", "hadamard_quantize_rows", 4096, elements=4096),
    _aot("14336-bf16", "hadamard_quantize_rows", 14336, elements=16384, max_instructions=60),
    _aot("11008-blocks-bf16", "hadamard_quantize_rows", 11008, block=256, elements=16384, targets=_NVIDIA),
)
# 1, primes, below and above powers of two, every kind of factor: none, a small one, Sylvester's, several of those
TEST_SHAPES = (
    shape(1, 1),
    shape(3, 2, signs=False),
    shape(5, 7),
    shape(2, 3, 12, transposed=True),
    shape(3, 24),
    shape(17, 64, signs=False),
    shape(5, 36, transposed=True),
    shape(3, 192),
    shape(2, 1, 448, transposed=True),
    shape(7, 96, block=32),
    shape(3, 255, block=1),
    shape(2, 513),
    shape(3, 1032, transposed=True),
    shape(2, 4096),
    shape(1, 1536, block=512, transposed=True),
)
ROWS_SHAPES = (
    shape(1, 1),
    shape(5, 7),
    shape(3, 24, signs=False),
    shape(17, 64),
    shape(2, 3, 448),
    shape(7, 96, block=32),
    shape(2, 513),
    shape(3, 4096),
    shape(2, 1536, block=512),
)
BENCH_SHAPES = {
    "cpu": (shape(256, 1536), shape(256, 4096)),
    "llama3_8b": (shape(2048, 4096), shape(2048, 14336), shape(16, 14336)),
}

SPECS = (
    OpSpec(
        name="hadamard",
        run=hadamard,
        ref=hadamard_ref,
        make=make,
        cost=cost,
        tol=EXACT,
        grad_tol=GRAD_TOL,
        keeps_strides=False,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=AOT,
        backward=True,
        backward_cost=cost,
    ),
    OpSpec(
        name="hadamard_quantize_rows",
        run=hadamard_quantize_rows,
        ref=hadamard_quantize_rows_ref,
        make=make_rows,
        cost=rows_cost,
        tol=EXACT,
        keeps_strides=False,
        test_shapes=ROWS_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=ROWS_AOT,
    ),
)
