"""Lists what tests, the AOT gate and the benchmarks run of fake-quant: shapes, tolerances, costs, launches.

A shape is `x` (sizes), `axis` and `group` (as `granularity_of` takes them), the levels `qmin` and `qmax`, `learned`
(False: only x gets a gradient) and `zero`, the kind of zero point: "none" (0), "integer" or "fraction".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gs_kernels.fake_quant.op import fake_quant
from gs_kernels.fake_quant.quantize import dequantize, quantize
from gs_kernels.fake_quant.ref import dequantize_ref, fake_quant_ref, quantize_ref
from gs_kernels.fake_quant.tiles import COLUMN_ELEMENTS, ELEMENTS
from gs_kernels.formats import granularity_of
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol

EXACT = {torch.float32: Tol(0, 0), torch.float16: Tol(0, 0), torch.bfloat16: Tol(0, 0)}
# autograd multiplies dy by s * (1 / s), which is not exactly 1, and rounds that to the dtype of x
GRAD_TOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def shape(x: tuple[int, ...], axis: int = -1, group: int = 0, **more: Any) -> Shape:
    return {"x": x, "axis": axis, "group": group, "qmin": -8, "qmax": 7, "zero": "none", "learned": True} | more


def channels(s: Shape) -> int:
    n = math.prod(s["x"])
    return n // s["group"] if s["group"] else s["x"][s["axis"]] if s["axis"] >= 0 else 1


def make_x(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(s["x"], generator=generator, device=device).mul_(2).to(dtype)


def make_qparams(s: Shape, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws scales that leave a fifth of a normal x outside the grid, and zeros of the kind that `s["zero"]` names."""
    n, levels = channels(s), s["qmax"] - s["qmin"]
    scale = torch.rand(n, generator=generator, device=device).add_(1).mul_(3 / levels)
    zero = torch.rand(n, generator=generator, device=device).mul_(levels).add_(s["qmin"])
    zero = {"none": zero * 0, "integer": zero.round(), "fraction": zero}[s["zero"]]
    return scale, zero + (s["qmin"] + s["qmax"]) / 2 if levels == 1 else zero


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x = make_x(s, dtype, device, generator)
    scale, zero = make_qparams(s, device, generator)
    ties = x.view(-1)[::5]
    ties.copy_(torch.arange(ties.numel(), device=device).remainder(37).sub(18) * scale[0] / 2)
    kwargs = {"qmin": s["qmin"], "qmax": s["qmax"], "granularity": granularity_of(s["axis"], s["group"])}
    return Case((x, scale, zero), kwargs, (0, 1, 2) if s["learned"] else (0,))


def make_without_gradient(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return replace(make(s, dtype, device, generator), grad_args=())


def make_codes(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    scale, zero = make_qparams(s, device, generator)
    codes = torch.randint(s["qmin"], s["qmax"] + 1, s["x"], generator=generator, device=device)
    kwargs = {"granularity": granularity_of(s["axis"], s["group"]), "dtype": dtype}
    return Case((codes.to(torch.int8 if s["qmin"] < 0 else torch.uint8), scale, zero), kwargs)


def _cost(per_element: Callable[[int], int], flops: int, s: Shape, dtype: torch.dtype) -> Cost:
    """Counts `per_element(itemsize)` bytes and `flops` operations for each element, and scale and zero once."""
    n = math.prod(s["x"])
    return Cost(nbytes=n * per_element(dtype.itemsize) + 8 * channels(s), flops=flops * n)


forward_cost = partial(_cost, lambda itemsize: 2 * itemsize, 7)
backward_cost = partial(_cost, lambda itemsize: 3 * itemsize, 11)
codes_cost = partial(_cost, lambda itemsize: itemsize + 1, 5)


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def launcher(op: str, folder: str, *args: Any) -> Callable[[], Any]:
    """Returns a function that imports the folder's kernel.py, which needs triton, and calls `<op>_triton` of it."""

    def run() -> Any:
        module = __import__(f"gs_kernels.{folder}.kernel", fromlist=["kernel"])
        return getattr(module, f"{op}_triton")(*args)

    return run


_X, _ROWS = meta(4096, 14336), meta(4096, dtype=torch.float32)
_ONE, _GROUPS = meta(1, dtype=torch.float32), meta(4096 * 112, dtype=torch.float32)
_COLS = meta(14336, dtype=torch.float32)
_NVIDIA = ("sm_90",)


def _aot(name: str, op: str, *args: Any, **bounds: Any) -> AotCase:
    return AotCase(name, launcher(op, "fake_quant", *args), **({"elements": ELEMENTS} | bounds))


AOT = (
    _aot("row-bf16", "fake_quant", _X, _ROWS, _ROWS, -8, 7, 0, 0, max_regs=40, max_instructions=18),
    _aot("group-bf16", "fake_quant", _X, _GROUPS, _GROUPS, -8, 7, -1, 128, max_regs=48, max_instructions=20),
    _aot("column-bf16", "fake_quant", _X, _COLS, _COLS, -8, 7, 1, 0, elements=COLUMN_ELEMENTS, targets=_NVIDIA),
    _aot("tensor-fp32", "fake_quant", _X.float(), _ONE, _ONE, 0, 255, -1, 0, max_instructions=18, targets=_NVIDIA),
)
BACKWARD_AOT = (
    _aot("row-lsq-bf16", "fake_quant_backward", _X, _X, _ROWS, _ROWS, -8, 7, 0, 0, True, True, max_instructions=36),
    _aot("row-ste-bf16", "fake_quant_backward", _X, _X, _ROWS, _ROWS, -8, 7, 0, 0, False, False, max_instructions=23),
)
QUANTIZE_AOT = (_aot("row-bf16", "quantize", _X, _ROWS, _ROWS, -8, 7, 0, 0, max_instructions=26, targets=_NVIDIA),)
DEQUANTIZE_AOT = (
    _aot("row-bf16", "dequantize", _X.to(torch.int8), _ROWS, _ROWS, 0, 0, torch.bfloat16, targets=_NVIDIA),
)

# one per way to find a scale and per edge of a tile: 1, primes, powers of two ± 1, more than one block each way
TEST_SHAPES = (
    shape((1,)),
    shape((), zero="integer"),
    shape((3, 7), axis=0, qmin=0, qmax=255, zero="integer"),
    shape((3, 4099), axis=0, zero="fraction"),
    shape((4097,), zero="fraction", learned=False),
    shape((17, 129), axis=1, qmin=-1, qmax=1),
    shape((65, 130), axis=1, qmin=0, qmax=3, zero="fraction"),
    shape((2, 5, 7, 7), axis=1, qmin=-128, qmax=127, zero="integer"),
    shape((2, 3, 64, 65), axis=1, qmin=-2, qmax=1, zero="fraction"),
    shape((5, 96), group=32, qmin=0, qmax=15, zero="integer"),
    shape((8, 3, 3, 4), group=9, learned=False),
    shape((6, 31), axis=0, qmin=-1, qmax=0),
)
BENCH_SHAPES = {
    "cpu": (shape((1024, 4096), axis=0), shape((4194304,), qmin=0, qmax=255, zero="integer")),
    "resnet50": (
        shape((512, 512, 3, 3), axis=0, qmin=-127, qmax=127),
        shape((2048, 1024, 1, 1), axis=0, qmin=-127, qmax=127),
        shape((64, 256, 56, 56), qmin=0, qmax=255, zero="integer"),
    ),
    "llama3_8b": (
        shape((14336, 4096), group=128),
        shape((4096, 14336), axis=0),
        shape((4, 2048, 4096), qmin=-128, qmax=127, zero="integer"),
    ),
    "64M": (shape((8192, 8192), axis=0), shape((8192, 8192), group=128), shape((67108864,), qmin=0, qmax=255)),
}

SPECS = (
    OpSpec(
        name="fake_quant",
        run=fake_quant,
        ref=fake_quant_ref,
        make=make,
        cost=forward_cost,
        tol=EXACT,
        grad_tol=GRAD_TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=AOT + BACKWARD_AOT,
        backward=True,
        backward_cost=backward_cost,
    ),
    OpSpec(
        name="quantize",
        run=quantize,
        ref=quantize_ref,
        make=make_without_gradient,
        cost=codes_cost,
        tol=EXACT,
        test_shapes=TEST_SHAPES,
        bench_shapes={"64M": BENCH_SHAPES["64M"]},
        aot=QUANTIZE_AOT,
    ),
    OpSpec(
        name="dequantize",
        run=dequantize,
        ref=dequantize_ref,
        make=make_codes,
        cost=codes_cost,
        tol=EXACT,
        test_shapes=TEST_SHAPES,
        bench_shapes={"64M": BENCH_SHAPES["64M"]},
        aot=DEQUANTIZE_AOT,
    ),
)
