"""Tells tests, the AOT gate and the benchmarks what to run of products with packed weights.

A shape is `x` (sizes, the last is K), `n`, `bits`, `group` (elements per scale), `zero`: "middle" (that of a symmetric
grid), "half" (half a step off), "points" (one per group, with fractions), "levels" (a table instead), "mxfp4" or
"nvfp4" (4-bit floats with 8-bit scales, `divisors` of them), `activation`, `bias`; of 8-bit rows, `static`: one scale
and zero point for all rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.formats import E2M1, FLOAT_GROUPS
from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.pack.pack import pack_weight
from gs_kernels.qmatmul.aot_cases import FP8, INT8, MATMUL, ROWS, int8_regimes, regimes
from gs_kernels.qmatmul.op import qmatmul
from gs_kernels.qmatmul.op_fp8 import qmatmul_fp8
from gs_kernels.qmatmul.op_int8 import code_sums, qmatmul_int8, quantize_rows
from gs_kernels.qmatmul.ref import FP8_MAX, qmatmul_fp8_ref, qmatmul_int8_ref, qmatmul_ref, quantize_rows_ref
from gs_kernels.runtime.opspec import Case, Cost, OpSpec, Shape, Tol

# y is about 1. fp16 weights are each off by up to 2**-12 of themselves, rounded once, and their scale once more; a sum
# of K of them, signs at random, is off by as much, and y is rounded once. bf16: 8 times that. Bounds are 5 sigma
TOL = {torch.float32: Tol(1e-5, 2e-5), torch.float16: Tol(1e-3, 3e-3), torch.bfloat16: Tol(8e-3, 2.4e-2)}
GRAD_TOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# sums of integers are exact: what remains is fp32 arithmetic on them, and the cast of y
INT8_TOL = {torch.float32: Tol(1e-5, 2e-6), torch.float16: Tol(1e-3, 2e-5), torch.bfloat16: Tol(8e-3, 2e-5)}
# x is made of exact values; tensor cores sum products of 8-bit floats to some 13 bits behind the largest
FP8_TOL = {torch.float32: Tol(1e-3, 1e-2), torch.float16: Tol(2e-3, 1e-2), torch.bfloat16: Tol(8e-3, 1e-2)}
EXACT = {torch.float32: Tol(0, 0), torch.float16: Tol(0, 0), torch.bfloat16: Tol(0, 0)}


def shape(x: tuple[int, ...], n: int, bits: int, group: int, zero: str = "middle", **more: Any) -> Shape:
    fields = {"x": x, "n": n, "bits": bits, "group": group, "zero": zero}
    return fields | {"activation": "none", "bias": True, "static": False, "axis": -1, "divisors": 1} | more


def make_weight(s: Shape, device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> PackedWeight:
    """Makes a weight with scales such that a product with a normal x is about normal."""
    n, k, bits = s["n"], s["x"][-1], s["bits"]
    draw: dict[str, Any] = {"generator": generator, "device": device}
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, **draw)
    step = 2 / (2**bits * k**0.5)
    scale = torch.rand(n, k // s["group"], **draw).add_(1).mul_(step).to(dtype)
    if s["zero"] in FLOAT_GROUPS:
        return _of_floats(s, codes, scale.float())
    middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    zero: Tensor | float = {"middle": middle, "half": middle - 0.5, "levels": 0.0}.get(s["zero"], 0.0)
    if s["zero"] == "points":
        zero = torch.rand(n, k // s["group"], **draw).mul_(2**bits - 1).to(dtype)
    levels = torch.randn(2**bits, **draw).mul_(2**bits / 3) if s["zero"] == "levels" else None
    group = s["group"]
    return pack_weight(codes, scale, zero, bits=bits, group_size=group, levels=levels, layout=PLANAR)


def _of_floats(s: Shape, codes: Tensor, scale: Tensor) -> PackedWeight:
    """Makes a weight of 4-bit floats, with as many divisors as the shape says, with scales near those given."""
    args: dict[str, Any] = {"bits": 4, "group_size": s["group"], "layout": PLANAR}
    args["levels"] = torch.tensor(E2M1, device=codes.device)
    if s["zero"] == "mxfp4":
        return pack_weight(codes, scale.log2().round().exp2().to(torch.float8_e8m0fnu), **args)
    divisor = torch.linspace(300.0, 1000.0, s["divisors"], device=codes.device)
    each = divisor.repeat_interleave(len(scale) // s["divisors"]).unsqueeze(1)
    return pack_weight(codes, (scale * each).to(torch.float8_e4m3fn), divisor=divisor, **args)


def _bias(s: Shape, device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> Tensor | None:
    return torch.randn(s["n"], generator=generator, device=device).to(dtype) if s["bias"] else None


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randn(s["x"], generator=generator, device=device).to(dtype)
    weight = make_weight(s, device, generator, dtype)
    bias = _bias(s, device, generator, dtype)
    return Case((x, weight, bias), {"activation": s["activation"]}, (0,) if bias is None else (0, 2))


def make_int8(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randint(-127, 128, s["x"], generator=generator, device=device, dtype=torch.int8)
    rows = (1,) if s["static"] else s["x"][:-1]
    x_scale = torch.rand(rows, generator=generator, device=device).add_(0.5).div_(64)
    weight = make_weight(s, device, generator, torch.float32)
    kwargs: dict[str, Any] = {"activation": s["activation"], "dtype": dtype}
    if s["static"]:
        zero = torch.randint(-128, 128, (1,), generator=generator, device=device).float()
        kwargs |= {"x_zero": zero, "code_sums": code_sums(weight)}
    return Case((x, x_scale, weight, _bias(s, device, generator, torch.float32)), kwargs)


def make_fp8(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    """Draws rows that float8_e4m3 holds exactly, scale 2**-7: the interpreter's casts lose a bit that carries over.

    The largest of a row, which sets its scale, is no larger than normal numbers are: the error of a sum on tensor cores
    is a part of its largest addend.
    """
    case = make(s, dtype, device, generator)
    most = FP8_MAX / 128
    x = case.args[0].float().clamp(-most, most).to(torch.float8_e4m3fn).to(dtype)
    x[..., 0] = most
    return Case((x, *case.args[1:]), case.kwargs)


def make_rows(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    return Case((torch.randn(s["x"], generator=generator, device=device).to(dtype),), {})


def _sizes(s: Shape) -> tuple[int, int, int]:
    return math.prod(s["x"][:-1]), s["n"], s["x"][-1]


def _weight_bytes(s: Shape, scale_bytes: int) -> int:
    _, n, k = _sizes(s)
    return n * k * s["bits"] // 8 + n * (k // s["group"]) * scale_bytes * (2 if s["zero"] == "points" else 1)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    m, n, k = _sizes(s)
    return Cost(nbytes=_weight_bytes(s, dtype.itemsize) + (m * k + m * n) * dtype.itemsize, flops=2 * m * n * k)


def int8_cost(s: Shape, dtype: torch.dtype) -> Cost:
    m, n, k = _sizes(s)
    return Cost(nbytes=_weight_bytes(s, 4) + m * k + m * n * dtype.itemsize, flops=2 * m * n * k)


def rows_cost(s: Shape, dtype: torch.dtype) -> Cost:
    size = math.prod(s["x"])
    return Cost(nbytes=size * (dtype.itemsize + 1) + 4 * size // s["x"][-1], flops=6 * size)


# 1, primes, powers of two ± 1, several tiles each way, partials; groups within, at and over a block of 128
TEST_SHAPES = (
    shape((1, 1), 3, 4, 1),
    shape((3, 127), 33, 2, 127, "half", activation="relu"),
    shape((17, 256), 129, 4, 128, activation="silu"),
    shape((5, 160), 31, 8, 32, "points", activation="gelu"),
    shape((2, 9, 192), 31, 1, 96, "half", bias=False),
    shape((7, 1024), 60, 4, 256, "points"),
    shape((33, 96), 7, 4, 32, "levels", bias=False),
    shape((131, 128), 40, 2, 64, "points", bias=False),
    shape((5, 160), 33, 4, 32, "mxfp4"),
    shape((17, 144), 34, 4, 16, "nvfp4", activation="relu"),
    shape((3, 48), 6, 4, 16, "nvfp4", divisors=2),
    shape((5, 80), 31, 8, 16, "points"),
)
INT8_SHAPES = (
    shape((1, 1), 3, 4, 1),
    shape((3, 127), 33, 2, 127, "half", static=True),
    shape((17, 256), 129, 4, 128, activation="silu"),
    shape((5, 160), 31, 8, 32, "points", activation="gelu"),
    shape((2, 9, 192), 31, 1, 96, bias=False),
    shape((7, 1280), 40, 8, 640, "points", static=True),
)
FP8_SHAPES = (
    shape((1, 1), 3, 4, 1),
    shape((17, 256), 129, 4, 128, activation="silu"),
    shape((5, 160), 31, 2, 32, "points", bias=False),
    shape((2, 9, 1280), 30, 1, 640, "points"),
)
ROWS_SHAPES = (
    shape((2, 1), 1, 8, 1),
    shape((3, 127), 1, 8, 127),
    shape((2, 5, 1025), 1, 8, 1025),
    shape((2, 16385), 1, 8, 16385),
)
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
BENCH_SHAPES = {
    "cpu": tuple(shape((m, 4096), 4096, bits, 128, bias=False) for bits in (4, 2, 1) for m in (1, 16, 128)),
    **{
        f"w{bits}": tuple(
            shape((m, k), n, bits, 128, bias=False) for n, k in LAYERS for m in (1, 16, 64, 256, 1024, 4096)
        )
        for bits in (4, 2, 1, 8)
    },
}
INT8_BENCH = {
    "cpu": tuple(shape((m, 4096), 4096, bits, 4096, bias=False) for bits in (8, 4) for m in (1, 16, 128)),
    "w4a8": tuple(shape((m, k), n, 4, 128, bias=False) for n, k in LAYERS for m in (64, 256, 1024, 4096)),
    "w8a8": tuple(shape((m, k), n, 8, k, bias=False) for n, k in LAYERS for m in (64, 256, 1024, 4096)),
}
ROWS_BENCH = {"llama3_8b": tuple(shape((m, k), 1, 8, k) for m in (16, 4096) for k in (4096, 14336))}

SPECS = (
    OpSpec(
        name="qmatmul",
        run=qmatmul,
        ref=qmatmul_ref,
        make=make,
        cost=cost,
        tol=TOL,
        keeps_strides=False,
        grad_tol=GRAD_TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=MATMUL,
        regimes=regimes,
    ),
    OpSpec(
        name="qmatmul_int8",
        run=qmatmul_int8,
        ref=qmatmul_int8_ref,
        make=make_int8,
        cost=int8_cost,
        tol=INT8_TOL,
        keeps_strides=False,
        test_shapes=INT8_SHAPES,
        bench_shapes=INT8_BENCH,
        aot=INT8,
        regimes=int8_regimes,
    ),
    OpSpec(
        name="qmatmul_fp8",
        run=qmatmul_fp8,
        ref=qmatmul_fp8_ref,
        make=make_fp8,
        cost=cost,
        tol=FP8_TOL,
        keeps_strides=False,
        test_shapes=FP8_SHAPES,
        bench_shapes={"w4a8": INT8_BENCH["w4a8"]},
        aot=FP8,
    ),
    OpSpec(
        name="quantize_rows",
        run=quantize_rows,
        ref=quantize_rows_ref,
        make=make_rows,
        cost=rows_cost,
        tol=EXACT,
        keeps_strides=False,
        test_shapes=ROWS_SHAPES,
        bench_shapes=ROWS_BENCH,
        aot=ROWS,
    ),
)
