"""Lists what tests, the AOT gate and the benchmarks run of the divergence: shapes, tolerances, costs, launches.

A shape is `x` (sizes of the logits, the last is V) and `temperature`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gs_kernels.fake_quant.spec import launcher, meta
from gs_kernels.kl_divergence.op import kl_divergence
from gs_kernels.kl_divergence.ref import kl_divergence_ref
from gs_kernels.kl_divergence.tiles import choose_tile
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol

# sums of V products in another order, and a difference of two logarithms of sums
TOL = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(1e-5, 4e-6))
GRAD_TOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def shape(*x: int, temperature: float = 2.0) -> Shape:
    return {"x": x, "temperature": temperature, "axis": -1, "group": 0}


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    student, teacher = (torch.randn(s["x"], generator=generator, device=device).mul_(3).to(dtype) for _ in range(2))
    return Case((student, teacher), {"temperature": s["temperature"]}, (0,))


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=2 * n * dtype.itemsize + 12 * n // s["x"][-1], flops=9 * n)


def backward_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=3 * n * dtype.itemsize + 12 * n // s["x"][-1], flops=7 * n)


def _aot(name: str, op: str, v: int, dtype: torch.dtype, **bounds: Any) -> AotCase:
    m = 2048
    logits, rows = meta(m, v, dtype=dtype), meta(m, dtype=torch.float32)
    args = (logits, logits, 2.0) if op == "kl_divergence" else (rows, logits, logits, rows, rows, 2.0)
    return AotCase(name, launcher(op, "kl_divergence", *args), elements=choose_tile(v).block_v, **bounds)


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields launches with each tile that there is."""
    for v in (1, 100, 1000, 4096, 151936):
        for op in ("kl_divergence", "kl_divergence_backward"):
            yield f"{op} {v}", _aot("", op, v, torch.bfloat16).launch


AOT = (
    _aot("bf16", "kl_divergence", 128256, torch.bfloat16, max_instructions=28),
    _aot("fp32", "kl_divergence", 128256, torch.float32, targets=("sm_90",)),
    _aot("backward-bf16", "kl_divergence_backward", 128256, torch.bfloat16, max_regs=40, max_instructions=19),
    _aot("backward-fp32", "kl_divergence_backward", 128256, torch.float32, targets=("sm_90",)),
)
# 1, primes, below and above powers of two, several turns of a row
TEST_SHAPES = (
    shape(1, 1),
    shape(7, temperature=1.0),
    shape(3, 2, temperature=4.0),
    shape(5, 127),
    shape(2, 3, 129, temperature=1.0),
    shape(2, 1023, temperature=0.5),
    shape(3, 4097),
    shape(1, 8192, temperature=4.0),
)
BENCH_SHAPES = {
    "cpu": (shape(256, 49152),),
    "resnet50": (shape(256, 1000, temperature=4.0),),
    "llama3_8b": (shape(2048, 128256, temperature=1.0),),
    "qwen3": (shape(4096, 151936, temperature=1.0),),
}

SPECS = (
    OpSpec(
        name="kl_divergence",
        run=kl_divergence,
        ref=kl_divergence_ref,
        make=make,
        cost=cost,
        tol=TOL,
        grad_tol=GRAD_TOL,
        keeps_strides=False,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=AOT,
        regimes=regimes,
        backward=True,
        backward_cost=backward_cost,
    ),
)
