"""Lists what tests, the AOT gate and the benchmarks run of requantizing: shapes, tolerances, costs, launches.

A shape is `x` (sizes), `b` (whether a second tensor is added), `out` (whether the result is codes), `activation`, and
the levels `qmin` and `qmax` of the result. `axis` and `group` say that one scale is for the whole tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gs_kernels.fake_quant.spec import EXACT, launcher, meta
from gs_kernels.fake_quant.tiles import ELEMENTS
from gs_kernels.requantize.op import requantize
from gs_kernels.requantize.ref import requantize_ref
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape


def shape(x: tuple[int, ...], **more: Any) -> Shape:
    fields = {"x": x, "axis": -1, "group": 0, "b": True, "out": True, "activation": "none"}
    return fields | {"qmin": -128, "qmax": 127} | more


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    def number(low: float, high: float) -> torch.Tensor:
        return torch.rand(1, generator=generator, device=device).mul_(high - low).add_(low)

    def operand() -> tuple[torch.Tensor, ...]:
        codes = torch.randint(-128, 128, s["x"], generator=generator, device=device, dtype=torch.int8)
        return codes, number(0.01, 0.06), number(-128, 127)

    kwargs = {"activation": s["activation"], "dtype": dtype, "qmin": s["qmin"], "qmax": s["qmax"]}
    if s["out"]:
        kwargs |= {"out_scale": number(0.03, 0.08), "out_zero": number(-40, 40)}
    return Case((*operand(), *(operand() if s["b"] else ())), kwargs)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    n = math.prod(s["x"])
    return Cost(
        nbytes=n * (1 + s["b"] + (1 if s["out"] else dtype.itemsize)), flops=n * (2 + 3 * s["b"] + 4 * s["out"])
    )


_CODES, _ONE = meta(32, 256, 56, 56, dtype=torch.int8), meta(1, dtype=torch.float32)
_A, _B, _NONE = (_CODES, _ONE, _ONE), (_CODES, _ONE, _ONE), (None, None, None)


def _aot(name: str, *args: Any, **bounds: Any) -> AotCase:
    return AotCase(name, launcher("requantize", "requantize", *args), elements=ELEMENTS, **bounds)


AOT = (
    _aot("add-relu", *_A, *_B, "relu", torch.float32, _ONE, _ONE, -128, 127),
    _aot("add-bf16", *_A, *_B, "none", torch.bfloat16, None, None, -128, 127, targets=("sm_90",)),
    _aot("move", *_A, *_NONE, "none", torch.float32, _ONE, _ONE, -128, 127, targets=("sm_90",)),
)
# every result, 1, primes, powers of two ± 1, more than one block; functions whose values are exact
TEST_SHAPES = (
    shape((1,), activation="relu"),
    shape((), b=False),
    shape((3, 7), out=False),
    shape((5, 1023), b=False, out=False, activation="relu6"),
    shape((17, 129), activation="hardswish"),
    shape((4097,), b=False, qmin=-8, qmax=7),
    shape((2, 5, 7, 7), activation="relu6", qmin=0, qmax=15),
    shape((2, 16, 9, 9), activation="relu", out=False),
    shape((6, 31, 65), qmin=-127),
)
BENCH_SHAPES = {
    "cpu": (shape((8, 256, 56, 56), activation="relu"), shape((8, 256, 56, 56), b=False, out=False)),
    "resnet50": tuple(
        shape((32, c, size, size), activation="relu") for c, size in ((256, 56), (512, 28), (1024, 14), (2048, 7))
    ),
}

SPECS = (
    OpSpec(
        name="requantize",
        run=requantize,
        ref=requantize_ref,
        make=make,
        cost=cost,
        tol=EXACT,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=AOT,
    ),
)
