"""Lists what tests, the AOT gate and the benchmarks run of scoring candidates.

A shape is `x` (rows, inputs), `outputs`, the number of `candidates`, and whether grids are `signed`. `axis` and `group`
are those of one scale for all of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gs_kernels.fake_quant.spec import launcher, make_x, meta
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol
from gs_kernels.score_candidates.op import score_candidates
from gs_kernels.score_candidates.ref import score_candidates_ref
from gs_kernels.score_candidates.tiles import choose_tile

# sums of squares of sums of some hundred products, in another order
TOL = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(2e-5, 2e-4))


def shape(m: int, k: int, outputs: int, candidates: int, signed: bool = True) -> Shape:
    return {"x": (m, k), "axis": -1, "group": 0, "outputs": outputs, "candidates": candidates, "signed": signed}


def _grid(s: Shape) -> dict[str, Any]:
    return {"qmin": -128 if s["signed"] else 0, "qmax": 127 if s["signed"] else 255}


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    draw: dict[str, Any] = {"generator": generator, "device": device}
    m, n = s["x"][0], s["outputs"]
    x, w = make_x(s, dtype, device, generator), torch.randn(n, s["x"][1], **draw).to(dtype)
    scale = torch.linspace(0.01, 0.1, s["candidates"], device=device)
    zero = torch.zeros_like(scale) if s["signed"] else torch.rand(s["candidates"], **draw).mul_(255).round_()
    target = torch.randn(m, n, **draw).to(dtype)
    return Case((x, scale, zero, w, target, torch.rand(m, n, **draw)), _grid(s))


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    (m, k), n, candidates = s["x"], s["outputs"], s["candidates"]
    nbytes = (m * k + n * k + m * n) * dtype.itemsize + 4 * m * n
    return Cost(nbytes + 4 * candidates * n, flops=2 * candidates * m * n * k)


def _aot(name: str, dtype: torch.dtype, **bounds: Any) -> AotCase:
    m, k, n, candidates = 4096, 768, 3072, 100
    grid, target = meta(candidates, dtype=torch.float32), meta(m, n, dtype=dtype)
    x, w = meta(m, k, dtype=dtype), meta(n, k, dtype=dtype)
    args = x, grid, grid, w, target, target, -128, 127
    tile = choose_tile(dtype)
    run = launcher("score_candidates", "score_candidates", *args)
    return AotCase(name, run, elements=tile.block_m * tile.block_k, **({"max_regs": 255} | bounds))


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields launches with each tile that there is."""
    for dtype in (torch.bfloat16, torch.float32):
        yield str(dtype).removeprefix("torch."), _aot("", dtype).launch


AOT = (
    _aot("bf16", torch.bfloat16, max_instructions=26),
    _aot("fp32", torch.float32, max_regs=128, max_instructions=95, targets=("sm_90",)),
)
TEST_SHAPES = (
    shape(1, 1, 1, 1),
    shape(3, 7, 5, 3, signed=False),
    shape(65, 31, 17, 2, signed=False),
    shape(33, 65, 129, 2),
    shape(127, 33, 9, 2),
)
BENCH_SHAPES = {
    "cpu": (shape(1024, 384, 384, 10),),
    "vit_base": (shape(4096, 768, 3072, 100), shape(4096, 3072, 768, 100)),
}

SPECS = (
    OpSpec(
        name="score_candidates",
        run=score_candidates,
        ref=score_candidates_ref,
        make=make,
        cost=cost,
        tol=TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        keeps_strides=False,
        aot=AOT,
        regimes=regimes,
    ),
)
