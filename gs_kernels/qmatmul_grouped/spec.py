"""Tells tests, the AOT gate and the benchmarks what to run of products with the weights of experts.

A shape is that of qmatmul, `n` rows of each of `experts`; `sizes` are the rows of each, and `x` may have more behind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch

from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.qmatmul.spec import GRAD_TOL, TOL, make_weight
from gs_kernels.qmatmul.spec import shape as product_shape
from gs_kernels.qmatmul_grouped.op import qmatmul_grouped
from gs_kernels.qmatmul_grouped.ref import qmatmul_grouped_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape


def shape(
    sizes: tuple[int, ...], n: int, k: int, bits: int, group: int, zero: str = "middle", behind: int = 0, **more: Any
) -> Shape:
    return product_shape((sum(sizes) + behind, k), n, bits, group, zero, **({"bias": False} | more)) | {"sizes": sizes}


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randn(s["x"], generator=generator, device=device).to(dtype)
    experts = len(s["sizes"])
    weight = make_weight({**s, "n": s["n"] * experts, "divisors": experts}, device, generator, dtype)
    offsets = torch.tensor(list(accumulate(s["sizes"])), dtype=torch.int32, device=device)
    if not s["bias"]:
        return Case((x, weight, offsets), {}, (0,))
    bias = torch.randn(s["n"] * experts, generator=generator, device=device).to(dtype)
    return Case((x, weight, offsets, bias), {}, (0, 3))


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    """Counts the weights of experts that have rows."""
    (m, k), n, hit = s["x"], s["n"], sum(size > 0 for size in s["sizes"])
    weights = n * k * s["bits"] // 8 + n * (k // s["group"]) * dtype.itemsize
    return Cost(nbytes=hit * weights + (m * k + m * n) * dtype.itemsize, flops=2 * m * n * k)


# experts without rows, at either end, too; one with all; one alone; rows that go to none; more than a tile of one
TEST_SHAPES = (
    shape((1,), 3, 1, 4, 1),
    shape((0, 3, 0, 4, 0), 33, 127, 2, 127, "half", bias=True),
    shape((0, 0, 19), 129, 256, 4, 128),
    shape((5, 0, 2, 17), 31, 160, 8, 32, "points", behind=3),
    shape((2, 7), 31, 192, 1, 96, "half", behind=1, bias=True),
    shape((37, 0, 130), 20, 128, 4, 64, "points"),
    shape((0, 0), 7, 96, 4, 32, "levels", behind=2),
    shape((3, 1, 18), 34, 144, 4, 16, "nvfp4", bias=True),
    shape((1, 2, 1), 33, 160, 4, 32, "mxfp4"),
)


def _even(tokens: int, experts: int, top: int) -> tuple[int, ...]:
    return tuple(tokens * top // experts + (e < tokens * top % experts) for e in range(experts))


BENCH_SHAPES = {
    "cpu": tuple(shape(_even(m, 8, 2), 1024, 1024, 4, 128) for m in (1, 16)),
    "mixtral": tuple(shape(_even(m, 8, 2), 28672, 4096, 4, 128) for m in (1, 16, 256, 2048)),
    "qwen3_30b": tuple(shape(_even(m, 128, 8), 1536, 2048, 4, 128) for m in (1, 16, 256, 2048)),
}


def _launcher(m: int, experts: int, n: int, k: int, bits: int) -> Callable[[], Any]:
    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.qmatmul_grouped.kernel")
        empty: dict[str, Any] = {"device": "meta"}
        codes = torch.empty(k // 128, experts * n, 8 * bits, dtype=torch.int16, **empty)
        scale = torch.empty(experts * n, k // 128, dtype=torch.bfloat16, **empty)
        zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
        weight = PackedWeight(codes, scale, zero, None, bits, (experts * n, k), 128, PLANAR)
        x = torch.empty(m, k, dtype=torch.bfloat16, **empty)
        return kernel.qmatmul_grouped_triton(x, weight, torch.empty(experts, dtype=torch.int64, **empty), None)

    return run


def _aot(name: str, m: int, experts: int, n: int, k: int, bits: int, **bounds: Any) -> AotCase:
    launch = _launcher(m, experts, n, k, bits)
    return AotCase(name, launch, **({"elements": 128 * 128, "max_regs": 255} | bounds))


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields launches of each width and rule of rows."""
    for bits in (4, 8, 2, 1)[: 4 if every else 2]:
        for tokens in (16, 512, 4096)[: 3 if every else 2]:
            yield f"w{bits}-m{tokens}", _launcher(tokens * 8, 128, 1536, 2048, bits)


AOT = (
    _aot("w4-few", 128, 128, 1536, 2048, 4, max_instructions=2.6, targets=("sm_90",)),
    _aot("w4-few", 128, 128, 1536, 2048, 4, targets=("sm_80", "sm_100", "gfx942")),
    _aot("w4-one", 2, 8, 4096, 14336, 4, elements=128 * 64, max_instructions=2.6, targets=("sm_90", "sm_100")),
    _aot("w4-one", 2, 8, 4096, 14336, 4, elements=128 * 64, targets=("sm_80", "gfx942")),
    _aot("w2-few", 128, 128, 1536, 2048, 2, targets=("sm_90",)),
    _aot("w4-many", 4096, 8, 28672, 4096, 4, mma="HGMMA", max_shared_stores=4, targets=("sm_90",)),
    _aot("w4-many", 4096, 8, 28672, 4096, 4, targets=("sm_80", "sm_100", "gfx942")),
)
SPECS = (
    OpSpec(
        name="qmatmul_grouped",
        run=qmatmul_grouped,
        ref=qmatmul_grouped_ref,
        make=make,
        cost=cost,
        tol=TOL,
        keeps_strides=False,
        grad_tol=GRAD_TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=AOT,
        regimes=regimes,
    ),
)
