"""Lists what tests, the AOT gate and the benchmarks run of rounding columns in turn.

A shape is `x` (columns, groups, rows), `zero` (whether codes have a zero point) and the codes `qmin` and `qmax`.
`axis` and `group` stand for a scale of each weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.spec import launcher, meta
from gs_kernels.gptq_block.op import gptq_block
from gs_kernels.gptq_block.ref import gptq_block_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol


def shape(columns: int, groups: int, rows: int, zero: bool = False, qmin: int = -8, qmax: int = 7) -> Shape:
    return {"x": (columns, groups, rows), "axis": 0, "group": 0, "zero": zero, "qmin": qmin, "qmax": qmax}


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    """Draws values with ties among them, scales of both signs and some of 0; below the diagonal the factor is NaN."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    columns, groups, _ = s["x"]
    start, scale = draw(*s["x"]), draw(*s["x"]).mul_(0.1).add_(0.3)
    scale.view(-1)[::11] = 0.0
    values = draw(*s["x"])
    values.view(-1)[::5] = (scale * 1.5).view(-1)[::5]
    factor = (
        draw(groups, columns, columns)
        .mul_(0.3)
        .masked_fill_(torch.ones(columns, columns, dtype=torch.bool, device=device).tril(), torch.nan)
    )
    zero = draw(*s["x"]).mul_(3).round_() if s["zero"] else None
    return Case((values, start, factor, scale, zero), {"qmin": s["qmin"], "qmax": s["qmax"]})


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n, (columns, groups, _) = math.prod(s["x"]), s["x"]
    nbytes = 4 * (n * (5 if s["zero"] else 4) + groups * columns * columns)
    return Cost(nbytes=nbytes, flops=n * (columns + 8))


def _aot(name: str, columns: int, rows: int, zero: bool, **bounds: Any) -> AotCase:
    values, factor = meta(columns, 1, rows, dtype=torch.float32), meta(1, columns, columns, dtype=torch.float32)
    run = launcher(
        "gptq_block",
        "gptq_block",
        values,
        values,
        factor,
        values,
        values if zero else None,
        *((0, 15) if zero else (-8, 7)),
    )
    return AotCase(name, run, elements=columns * 8, wide_loads=False, **bounds)


AOT = (
    _aot("128-symmetric", 128, 4096, False, max_instructions=11),
    _aot("128-zero", 128, 4096, True, max_instructions=11, targets=("sm_90",)),
)
TEST_SHAPES = (
    shape(1, 1, 1),
    shape(3, 2, 7, zero=True, qmin=0, qmax=15),
    shape(9, 5, 1),
    shape(31, 1, 17, zero=True, qmin=0, qmax=1),
    shape(33, 1, 35, qmin=-128, qmax=127),
    shape(128, 1, 9),
    shape(65, 2, 5, qmin=-2, qmax=1),
)
BENCH_SHAPES = {
    "cpu": (shape(128, 1, 576), shape(128, 1, 1536), shape(128, 1, 4096)),
    "llama3_8b": (shape(128, 1, 4096), shape(128, 1, 14336), shape(128, 1, 14336, zero=True, qmin=0, qmax=15)),
}

SPECS = (
    OpSpec(
        name="gptq_block",
        run=gptq_block,
        ref=gptq_block_ref,
        make=make,
        cost=cost,
        tol={torch.float32: Tol(0, 0)},
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        keeps_strides=False,
        aot=AOT,
    ),
)
