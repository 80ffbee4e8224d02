"""Lists what tests, the AOT gate and the benchmarks run of the observers: shapes, tolerances, costs, launches.

gs_kernels/fake_quant/spec.py says what a shape is.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gs_kernels.fake_quant.spec import (
    EXACT,
    GRAD_TOL,
    backward_cost,
    channels,
    forward_cost,
    launcher,
    make_qparams,
    make_x,
    meta,
    shape,
)
from gs_kernels.fake_quant.tiles import ELEMENTS
from gs_kernels.formats import granularity_of
from gs_kernels.observe.op import dynamic_fake_quant, minmax, observe_fake_quant
from gs_kernels.observe.qparams import choose_qparams
from gs_kernels.observe.ref import choose_qparams_ref, dynamic_fake_quant_ref, minmax_ref, observe_fake_quant_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape


def _make_minmax(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return Case((make_x(s, dtype, device, generator),), {"granularity": granularity_of(s["axis"], s["group"])})


def _make_dynamic(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    kwargs = {
        "qmin": s["qmin"],
        "qmax": s["qmax"],
        "symmetric": s["zero"] == "none",
        "granularity": granularity_of(s["axis"], s["group"]),
    }
    return Case((make_x(s, dtype, device, generator),), kwargs, (0,))


def _make_observe(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    args = make_x(s, dtype, device, generator), *make_qparams(s, device, generator)
    return Case(args, {"qmin": s["qmin"], "qmax": s["qmax"]}, (0, 1, 2) if s["learned"] else (0,))


def _make_qparams(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    low = torch.randn(s["x"], generator=generator, device=device)
    high = low + torch.rand(s["x"], generator=generator, device=device) * 4
    # a channel that is 0, one that is tiny, one that saw a NaN
    for value, low_high in enumerate(((0.0, 0.0), (-1e-38, 1e-38), (float("nan"), float("nan")))):
        if low.numel() > 4:
            low[value], high[value] = low_high
    return Case((low, high), {"qmin": s["qmin"], "qmax": s["qmax"], "symmetric": s["zero"] == "none"})


def _minmax_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=n * dtype.itemsize + 8 * channels(s), flops=2 * n)


def _qparams_cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(nbytes=16 * n, flops=8 * n)


_X, _ONE = meta(4096, 14336), meta(1, dtype=torch.float32)
_ROWS = meta(4096, dtype=torch.float32)
_NVIDIA = ("sm_90",)


def _aot(name: str, op: str, *args: Any, elements: int = ELEMENTS, **bounds: Any) -> AotCase:
    return AotCase(name, launcher(op, "observe", *args), elements, **bounds)


MINMAX_AOT = (_aot("row-bf16", "minmax", _X, 0, 0, targets=_NVIDIA),)
DYNAMIC_AOT = (
    _aot("group-bf16", "dynamic_fake_quant", _X, -8, 7, True, -1, 128, max_regs=56, max_instructions=36),
    _aot("row-bf16", "dynamic_fake_quant", _X, -8, 7, False, 0, 0, elements=16384, targets=_NVIDIA),
)
OBSERVE_AOT = (_aot("tensor-bf16", "observe_fake_quant", _X, _ONE, _ONE, 0, 255, max_regs=72, max_instructions=34),)
QPARAMS_AOT = (
    _aot("affine", "choose_qparams", _ROWS, _ROWS, 0, 255, False, elements=256, wide_loads=False, targets=_NVIDIA),
)

RANGE_SHAPES = (
    shape((1,)),
    shape((), zero="integer"),
    shape((3, 7), axis=0, qmin=0, qmax=255, zero="integer"),
    shape((3, 4099), axis=0),
    shape((4097,), zero="integer"),
    shape((65, 130), axis=1, qmin=0, qmax=3, zero="integer"),
    shape((2, 5, 7, 7), axis=1, qmin=-128, qmax=127),
    shape((5, 96), group=32, qmin=0, qmax=15, zero="integer"),
    shape((8, 3, 3, 4), group=9, qmin=-1, qmax=0),
    shape((2, 16411), axis=0, qmin=-127, qmax=127),
)
OBSERVE_SHAPES = (
    shape((1,)),
    shape((3, 7), qmin=0, qmax=255, zero="integer"),
    shape((4097,), zero="fraction"),
    shape((2, 3, 64, 65), qmin=-128, qmax=127, zero="integer", learned=False),
)
QPARAMS_SHAPES = (shape((1,)), shape((257,), qmin=-128, qmax=127, zero="integer"), shape((31,), qmin=0, qmax=1))
BENCH_WEIGHTS = {
    "resnet50": (shape((512, 512, 3, 3), axis=0, qmin=-127, qmax=127),),
    "llama3_8b": (shape((14336, 4096), group=128), shape((4096, 14336), axis=0)),
    "64M": (shape((8192, 8192), axis=0),),
}
BENCH_ACTIVATIONS = {
    "cpu": (shape((4194304,), qmin=0, qmax=255, zero="integer", learned=False),),
    "resnet50": (shape((64, 256, 56, 56), qmin=0, qmax=255, zero="integer", learned=False),),
    "64M": (shape((67108864,), qmin=0, qmax=255, zero="integer", learned=False),),
}

SPECS = (
    OpSpec(
        name="minmax",
        run=minmax,
        ref=minmax_ref,
        make=_make_minmax,
        cost=_minmax_cost,
        tol=EXACT,
        test_shapes=RANGE_SHAPES,
        bench_shapes=BENCH_ACTIVATIONS,
        aot=MINMAX_AOT,
    ),
    OpSpec(
        name="choose_qparams",
        run=choose_qparams,
        ref=choose_qparams_ref,
        make=_make_qparams,
        cost=_qparams_cost,
        tol={torch.float32: EXACT[torch.float32]},
        test_shapes=QPARAMS_SHAPES,
        bench_shapes={"layers": (shape((1,), zero="integer"), shape((4096,)))},
        aot=QPARAMS_AOT,
    ),
    OpSpec(
        name="dynamic_fake_quant",
        run=dynamic_fake_quant,
        ref=dynamic_fake_quant_ref,
        make=_make_dynamic,
        cost=forward_cost,
        tol=EXACT,
        grad_tol=GRAD_TOL,
        test_shapes=RANGE_SHAPES,
        bench_shapes=BENCH_WEIGHTS,
        aot=DYNAMIC_AOT,
        backward=True,
        backward_cost=backward_cost,
    ),
    OpSpec(
        name="observe_fake_quant",
        run=observe_fake_quant,
        ref=observe_fake_quant_ref,
        make=_make_observe,
        cost=forward_cost,
        tol=EXACT,
        grad_tol=GRAD_TOL,
        test_shapes=OBSERVE_SHAPES,
        bench_shapes=BENCH_ACTIVATIONS,
        aot=OBSERVE_AOT,
        backward=True,
        backward_cost=backward_cost,
    ),
)
