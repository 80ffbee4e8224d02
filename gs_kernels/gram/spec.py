"""Lists what tests, the AOT gate and the benchmarks run of summing products of columns.

A shape is `x` (groups, tokens, columns) and `cross` (whether another input is compared). `axis` and `group` are
those of one sum for all tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.spec import launcher, meta
from gs_kernels.gram.op import gram_
from gs_kernels.gram.ref import gram_ref
from gs_kernels.gram.tiles import MANY, choose_tile
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol

# products of 16 bits are exact, and sums of some hundred normal numbers are fp32 in another order
TOL = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(1e-5, 1e-4))


def shape(groups: int, tokens: int, k: int, cross: bool = False) -> Shape:
    return {"x": (groups, tokens, k), "axis": -1, "group": 0, "cross": cross}


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    """Draws tokens, and sums that are there."""
    groups, _, k = s["x"]
    draw: dict[str, Any] = {"generator": generator, "device": device}
    x, before = torch.randn(s["x"], **draw).to(dtype), torch.randn(groups, k, k, **draw)
    floats = None
    if s["cross"]:
        floats = (x.float() + 0.1 * torch.randn(s["x"], **draw)).to(dtype)
    return Case((x, before if s["cross"] else before + before.mT, floats), {})


def gram(x: Tensor, before: Tensor, floats: Tensor | None) -> Tensor:
    """Calls `gram_` on a copy of the sums, and returns the copy."""
    total = before.clone()
    gram_(total, x, floats)
    return total


def _ref(x: Tensor, before: Tensor, floats: Tensor | None) -> Tensor:
    return gram_ref(before, x, floats)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    """Counts the sums as read, in the upper triangle, and written; and the copy of them that `gram` makes."""
    groups, tokens, k = s["x"]
    inputs = groups * tokens * k * dtype.itemsize * (2 if s["cross"] else 1)
    sums = 4 * groups * k * k * (4 if s["cross"] else 3)
    return Cost(nbytes=inputs + sums, flops=groups * tokens * k * (2 * k if s["cross"] else k + 1))


def _launch(k: int, dtype: torch.dtype, cross: bool) -> Callable[[], Any]:
    x, total = meta(1, 2048, k, dtype=dtype), meta(1, k, k, dtype=torch.float32)
    return launcher("gram_", "gram", total, x, x if cross else None)


def _aot(name: str, k: int, dtype: torch.dtype, cross: bool = False, **bounds: Any) -> AotCase:
    tile = choose_tile(k, dtype, cross)
    run = _launch(k, dtype, cross)
    return AotCase(name, run, elements=tile.block_k * tile.block_t, **({"max_regs": 255} | bounds))


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields launches with each tile that there is."""
    dtypes = (torch.bfloat16, torch.float32)
    for k, dtype, cross in itertools.product((16, 64, MANY + 1), dtypes, (False, True)):
        yield f"k{k}-{str(dtype).removeprefix('torch.')}{'-cross' if cross else ''}", _launch(k, dtype, cross)


_HOPPER = ("sm_90",)
AOT = (
    _aot("k4096-bf16", 4096, torch.bfloat16, max_instructions=10),
    _aot("k4096-cross-bf16", 4096, torch.bfloat16, cross=True, max_instructions=13),
    _aot("k576-bf16", 576, torch.bfloat16, mma="HGMMA", max_regs=128, max_instructions=7, targets=_HOPPER),
    _aot("k576-fp16", 576, torch.float16, mma="HGMMA", max_regs=128, max_instructions=7, targets=_HOPPER),
    _aot("k4096-fp32", 4096, torch.float32, max_regs=128, max_instructions=80, targets=_HOPPER),
)
TEST_SHAPES = (
    shape(1, 1, 1),
    shape(1, 3, 7, cross=True),
    shape(3, 31, 9),
    shape(1, 129, 63, cross=True),
    shape(1, 65, 129),
    shape(2, 17, 257),
    shape(1, 33, 300),
)
BENCH_SHAPES = {
    "cpu": (shape(1, 1024, 576), shape(1, 1024, 1536), shape(1, 1024, 4096)),
    "llama3_8b": (shape(1, 2048, 4096), shape(1, 2048, 14336), shape(1, 2048, 4096, cross=True)),
}

SPECS = (
    OpSpec(
        name="gram_",
        run=gram,
        ref=_ref,
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
