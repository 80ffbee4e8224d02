"""Lists what tests, the AOT gate and the benchmarks run of searching clip ratios.

A shape is `x` (rows and their elements), the number of `ratios`, whether errors are `weighed`, the levels `qmin` and
`qmax`, and whether the grid is `symmetric`. `axis` and `group` are those of one scale a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.spec import launcher, make_x, meta
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol
from gs_kernels.search_clip_ratio.op import search_clip_ratio
from gs_kernels.search_clip_ratio.ref import search_clip_ratio_ref, squared_error_ref


def shape(rows: int, n: int, ratios: int = 20, **more: Any) -> Shape:
    default = {"weighed": False, "qmin": -8, "qmax": 7, "symmetric": True}
    return {"x": (rows, n), "axis": 0, "group": 0, "ratios": ratios} | default | more


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    """Draws rows with an outlier each, one row of zeros, one that is all positive."""
    x = make_x(s, dtype, device, generator)
    x[:, -1] *= 4
    x[::3] = x[::3].abs()
    x[1:2] = 0
    importance = torch.rand(s["x"], generator=generator, device=device) if s["weighed"] else None
    ratios = torch.linspace(1.0, 0.2, s["ratios"], device=device)
    return Case((x, ratios, importance), {name: s[name] for name in ("qmin", "qmax", "symmetric")})


def least_error(x: Tensor, ratios: Tensor, importance: Tensor | None, **grid: Any) -> Tensor:
    """Computes the errors `[C]` with the ratios that are found: near the least, another ratio is as right."""
    return squared_error_ref(x, search_clip_ratio(x, ratios, importance, **grid), importance, **grid)


def _least_error_ref(x: Tensor, ratios: Tensor, importance: Tensor | None, **grid: Any) -> Tensor:
    return squared_error_ref(x, search_clip_ratio_ref(x, ratios, importance, **grid), importance, **grid)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=n * (dtype.itemsize + 4 * s["weighed"]) + 4 * s["x"][0], flops=11 * n * s["ratios"])


def _aot(name: str, rows: int, n: int, elements: int, weighed: bool, *grid: Any, **bounds: Any) -> AotCase:
    x, ratios = meta(rows, n), meta(80, dtype=torch.float32)
    importance = meta(rows, n, dtype=torch.float32) if weighed else None
    run = launcher("search_clip_ratio", "search_clip_ratio", x, ratios, importance, *grid)
    return AotCase(name, run, elements, wide_loads=False, **bounds)


AOT = (
    _aot("group-bf16", 4096 * 32, 128, 2048, False, -8, 7, True, max_instructions=21),
    _aot("group-weighed-bf16", 4096 * 32, 128, 2048, True, 0, 15, False, max_instructions=28, targets=("sm_90",)),
    _aot("row-bf16", 4096, 14336, 16384, False, -8, 7, True, max_instructions=17, targets=("sm_90",)),
)
TEST_SHAPES = (
    shape(1, 1),
    shape(3, 7, 1, symmetric=False, qmin=0, qmax=15),
    shape(33, 32, weighed=True),
    shape(5, 129, 17, symmetric=False, qmin=0, qmax=3, weighed=True),
    shape(2, 1025, qmin=0, qmax=1),
    shape(7, 31, qmin=-128, qmax=127, symmetric=False),
)
BENCH_SHAPES = {
    "cpu": (shape(9 * 576, 64, 80), shape(1536, 576, 80, symmetric=False)),
    "llama3_8b": (shape(4096 * 112, 128, 80), shape(4096, 14336, 80, weighed=True)),
}

SPECS = (
    OpSpec(
        name="search_clip_ratio",
        run=least_error,
        ref=_least_error_ref,
        make=make,
        cost=cost,
        tol=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(1e-5, 1e-12)),
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        keeps_strides=False,
        aot=AOT,
    ),
)
