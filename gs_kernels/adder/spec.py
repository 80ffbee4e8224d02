"""Lists what tests, the AOT gate and the benchmarks run of L1 products: shapes, tolerances, costs, launches.

A shape is `x` (B, C, H, W), or (.., K) of a linear layer, `o`, the channels of y, and of a convolution its geometry as
`torch.nn.Conv2d` has it. Of codes it is also what the result is: `out`, "int32", "float" or None for int8; the
activation; and `residual`: None, "float" or "int8".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gs_kernels.adder.op import adder_conv2d, adder_linear
from gs_kernels.adder.op_int8 import adder_int8
from gs_kernels.adder.ref import adder_conv2d_ref, adder_int8_ref, adder_linear_ref
from gs_kernels.adder.tiles import choose_gradient_tile, choose_tile
from gs_kernels.fake_quant.spec import launcher, meta
from gs_kernels.qconv2d.geometry import ConvGeometry, make_geometry
from gs_kernels.runtime.opspec import AotCase, Case, Cost, OpSpec, Shape, Tol

# all terms have one sign, so that sums of K of them in any order agree to some 1e-7 of themselves
TOL = {torch.float32: Tol(2e-6, 1e-6), torch.float16: Tol(1e-3, 1e-3), torch.bfloat16: Tol(8e-3, 8e-3)}
GRAD_TOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EXACT = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tol(0, 0))
GEOMETRY = ("stride", "padding", "dilation")


def shape(x: tuple[int, ...], o: int, kernel_size: tuple[int, int] = (1, 1), **more: Any) -> Shape:
    fields: Shape = {"x": x, "o": o, "kernel_size": kernel_size, "stride": 1, "padding": 0, "dilation": 1}
    fields |= {"out": None, "activation": "none", "residual": None, "zero": False, "axis": -1, "group": 0}
    return fields | more


def _geometry(s: Shape) -> ConvGeometry:
    return make_geometry("spec", s["kernel_size"], s["stride"], s["padding"], s["dilation"], 1)


def _result(s: Shape) -> tuple[int, int, int, int]:
    return s["x"][0], s["o"], *_geometry(s).output(*s["x"][2:])


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    sizes = s["x"], (s["o"], s["x"][1], *s["kernel_size"])
    x, w = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    return Case((x, w), {name: s[name] for name in GEOMETRY}, (0, 1))


def make_linear(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    x, w = (torch.randn(n, generator=generator, device=device).to(dtype) for n in (s["x"], (s["o"], s["x"][-1])))
    return Case((x, w), {}, (0, 1))


def make_int8(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    draw: dict[str, Any] = {"generator": generator, "device": device}

    def number(low: float, high: float) -> Tensor:
        return torch.rand(1, **draw).mul_(high - low).add_(low)

    def codes(*size: int) -> Tensor:
        return torch.randint(-128, 128, size, dtype=torch.int8, **draw)

    k = s["x"][1] * math.prod(s["kernel_size"])
    args: tuple[Any, ...] = (codes(*s["x"]), codes(s["o"], s["x"][1], *s["kernel_size"]))
    kwargs: dict[str, Any] = {name: s[name] for name in GEOMETRY}
    if s["zero"]:
        kwargs["zero"] = number(-128, 127).round_()
    if s["out"] == "int32":
        return Case(args, kwargs)
    scale = torch.rand(s["o"] if s["o"] % 2 else 1, **draw).add_(0.5).mul_(0.02 / k**0.5)
    args += (scale, torch.rand(s["o"], **draw).mul_(2 * k**0.5))  # y is about as wide as the grid of codes
    kwargs |= {"activation": s["activation"], "dtype": dtype}
    if s["residual"] == "int8":
        kwargs |= {"residual": codes(*_result(s)), "residual_scale": number(0.01, 0.03)}
        kwargs["residual_zero"] = number(-128, 127).round_()
    elif s["residual"]:
        kwargs["residual"] = torch.randn(_result(s), **draw).to(dtype)
    if s["out"] is None:
        kwargs |= {"out_scale": number(0.1, 0.2), "out_zero": number(-40, 40).round_()}
    return Case(args, kwargs)


def _cost(s: Shape, nbytes: int, y_bytes: int) -> Cost:
    outputs, k = math.prod(_result(s)), s["x"][1] * math.prod(s["kernel_size"])
    return Cost(nbytes=(math.prod(s["x"]) + s["o"] * k) * nbytes + outputs * y_bytes, flops=2 * outputs * k)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    return _cost(s, dtype.itemsize, dtype.itemsize)


def backward_cost(s: Shape, dtype: torch.dtype) -> Cost:
    outputs, k = math.prod(_result(s)), s["x"][1] * math.prod(s["kernel_size"])
    operands = 2 * (math.prod(s["x"]) + s["o"] * k) + outputs
    return Cost(nbytes=operands * dtype.itemsize, flops=5 * outputs * k)  # 3 of dx and a product


def int8_cost(s: Shape, dtype: torch.dtype) -> Cost:
    return _cost(s, 1, {None: 1, "int32": 4, "float": dtype.itemsize}[s["out"]])


def linear_cost(s: Shape, dtype: torch.dtype) -> Cost:
    m, k = math.prod(s["x"][:-1]), s["x"][-1]
    return Cost(nbytes=(m * k + s["o"] * k + m * s["o"]) * dtype.itemsize, flops=2 * m * k * s["o"])


# odd channels and sizes, 1 x 1 to 7 x 3, strides, dilation, one-sided padding, pixels and channels of several tiles
TEST_SHAPES = (
    shape((1, 1, 1, 1), 3),
    shape((2, 5, 7, 6), 17, (3, 3), padding=1),
    shape((1, 9, 4, 5), 5, (2, 3), padding="same", dilation=(1, 2)),
    shape((1, 3, 9, 11), 8, (5, 3), stride=2, padding=(2, 1)),
    shape((2, 8, 5, 5), 12, (1, 1), stride=(2, 1)),
    shape((1, 2, 5, 4), 6, (2, 2), stride=3, padding=1),
    shape((1, 9, 16, 18), 17),
    shape((1, 2, 1, 600), 3, (1, 2), dilation=(1, 3)),
)
LINEAR_SHAPES = (shape((1, 1), 1), shape((7,), 3), shape((5, 17), 12), shape((2, 3, 9), 17), shape((33, 4), 20))
INT8_SHAPES = (
    shape((1, 1, 1, 1), 3, out="int32"),
    shape((2, 5, 7, 6), 17, (3, 3), padding=1, zero=True, activation="hardswish"),
    shape((1, 9, 4, 5), 5, (2, 3), padding="same", dilation=(1, 2), zero=True, out="int32"),
    shape((1, 3, 9, 11), 16, (5, 3), stride=2, padding=2, zero=True, activation="relu", out="float"),
    shape((2, 8, 5, 5), 12, stride=(2, 1), residual="int8", activation="relu6"),
    shape((1, 9, 16, 18), 17, residual="float"),
)


def _conv(c: int, o: int, size: int, kernel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, ConvGeometry]:
    pad = kernel // 2
    geometry = ConvGeometry(kernel, kernel, top=pad, bottom=pad, left=pad, right=pad)
    return meta(32, c, size, size, dtype=dtype), meta(o, c, kernel, kernel, dtype=dtype), geometry


def _forward(c: int, o: int, size: int, kernel: int, dtype: torch.dtype) -> AotCase:
    x, w, geometry = _conv(c, o, size, kernel, dtype)
    tile = choose_tile((size - 1) * (size + kernel - 1) + size, o)
    name = f"{c}-{o}-{size}-{kernel}x{kernel}-{str(dtype).removeprefix('torch.')}"
    elements = tile.block_m * tile.block_n * tile.unroll
    return AotCase(name, launcher("adder_conv2d", "adder", x, w, geometry), elements)


def _gradient(c: int, o: int, size: int, kernel: int, dtype: torch.dtype) -> AotCase:
    x, w, geometry = _conv(c, o, size, kernel, dtype)
    tile = choose_gradient_tile((size - 1) * (size + kernel - 1) + size)
    dy = meta(32, o, size, size, dtype=dtype)
    name = f"dx-{c}-{o}-{size}-{kernel}x{kernel}-{str(dtype).removeprefix('torch.')}"
    run = launcher("adder_conv2d_dx", "adder", dy, x, w, geometry)
    return AotCase(name, run, tile.block_m * tile.block_n * tile.unroll)


def _codes(c: int, o: int, size: int, kernel: int) -> AotCase:
    x, w, geometry = _conv(c, o, size, kernel, torch.int8)
    tile = choose_tile((size - 1) * (size + kernel - 1) + size, o)
    channels, one = meta(o, dtype=torch.float32), meta(1, dtype=torch.float32)
    args = (x, w, channels, channels, geometry, one, None, None, None, one, one, "relu", torch.float32)
    elements = tile.block_m * tile.block_n * tile.unroll  # words of four pairs
    return AotCase(f"{c}-{o}-{size}-{kernel}x{kernel}-int8", launcher("adder_int8", "adder", *args), elements)


def _bounded(case: AotCase, main: str, **bounds: tuple[int, float | None]) -> Iterator[AotCase]:
    """Yields the case for each target, with its registers and instructions.

    Copies of images and filters are among the launches: their loads are narrow, and their instructions few.
    """
    for target, (registers, instructions) in bounds.items():
        bound: dict[str, Any] = {
            "max_regs": registers,
            "max_instructions": instructions,
            "main": main,
            "wide_loads": False,
        }
        yield replace(case, name=f"{case.name}-{target}", targets=(target,), **bound)


FLOAT, HALF = torch.float32, torch.bfloat16
AOT = (
    *_bounded(
        _forward(64, 64, 56, 3, FLOAT),
        "_adder_kernel",
        sm_80=(168, 2.25),
        sm_90=(112, 2.3),
        sm_100=(200, 2.3),
        gfx942=(384, None),
    ),
    *_bounded(
        _forward(128, 128, 28, 3, FLOAT), "_adder_kernel", sm_80=(168, 2.25), sm_90=(112, 2.3), sm_100=(200, 2.3)
    ),
    *_bounded(_forward(256, 64, 56, 1, FLOAT), "_adder_kernel", sm_80=(144, 2.25), sm_90=(112, 2.3), sm_100=(168, 2.7)),
    *_bounded(
        _forward(128, 128, 28, 3, HALF),
        "_adder_kernel",
        sm_80=(168, 2.35),
        sm_90=(112, 2.4),
        sm_100=(200, 2.5),
        gfx942=(384, None),
    ),
    *_bounded(
        _forward(128, 128, 28, 3, torch.float16),
        "_adder_kernel",
        sm_80=(168, 2.35),
        sm_90=(112, 2.4),
        sm_100=(200, 2.5),
    ),
    *_bounded(
        _gradient(64, 64, 56, 3, FLOAT),
        "_adder_dx_kernel",
        sm_80=(248, 2.45),
        sm_90=(168, 2.55),
        sm_100=(168, 2.6),
        gfx942=(128, None),
    ),
    *_bounded(
        _gradient(128, 128, 28, 3, FLOAT), "_adder_dx_kernel", sm_80=(248, 2.45), sm_90=(168, 2.55), sm_100=(168, 2.6)
    ),
    *_bounded(
        _gradient(128, 128, 28, 3, HALF),
        "_adder_dx_kernel",
        sm_80=(248, 2.7),
        sm_90=(168, 2.75),
        sm_100=(168, 2.75),
        gfx942=(128, None),
    ),
)
INT8 = (
    *_bounded(
        _codes(64, 64, 56, 3),
        "_adder_int8_kernel",
        sm_80=(152, 1.25),
        sm_90=(144, 1.25),
        sm_100=(144, 1.4),
        gfx942=(128, None),
    ),
    *_bounded(_codes(128, 128, 28, 3), "_adder_int8_kernel", sm_80=(152, 1.25), sm_90=(144, 1.25), sm_100=(144, 1.4)),
)
_ROWS = launcher("adder_linear", "adder", *(meta(n, 1024, dtype=FLOAT) for n in (4096, 1024)))
LINEAR = tuple(
    _bounded(
        AotCase("1024-1024-float32", _ROWS, 256 * 16 * 8),
        "_adder_kernel",
        sm_80=(144, 2.25),
        sm_90=(112, 2.3),
        sm_100=(168, 2.7),
    )
)


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields launches with each tile that there is, of laid out images and of such as are."""
    for o in (1, 9, 64):
        for size in (1, 7, 14, 28, 56) if every else (7, 56):
            for kernel in (1, 3):
                yield f"adder_conv2d {o} {size} {kernel}", _forward(16, o, size, kernel, torch.float32).launch
                yield f"adder_conv2d_dx {o} {size} {kernel}", _gradient(16, o, size, kernel, torch.float32).launch


def int8_regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for o in (1, 9, 64):
        for size in (1, 7, 14, 28, 56) if every else (7, 56):
            yield f"adder_int8 {o} {size}", _codes(16, o, size, 3).launch


# layers of ResNet-20 on 32 x 32 pixels, and one of ResNet-18
_LAYERS: tuple[Shape, ...] = tuple(
    shape((batch, c, size, size), c, (3, 3), padding=1)
    for batch, c, size in ((4, 16, 32), (4, 32, 16), (4, 64, 8), (1, 128, 14))
)
BENCH_SHAPES = {"cpu": _LAYERS, "resnet18": (shape((8, 64, 56, 56), 64, (3, 3), padding=1),)}

SPECS = (
    OpSpec(
        name="adder_conv2d",
        run=adder_conv2d,
        ref=adder_conv2d_ref,
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
    OpSpec(
        name="adder_linear",
        run=adder_linear,
        ref=adder_linear_ref,
        make=make_linear,
        cost=linear_cost,
        tol=TOL,
        grad_tol=GRAD_TOL,
        keeps_strides=False,
        test_shapes=LINEAR_SHAPES,
        bench_shapes={"cpu": (shape((784, 576), 64),)},
        aot=LINEAR,
    ),
    OpSpec(
        name="adder_int8",
        run=adder_int8,
        ref=adder_int8_ref,
        make=make_int8,
        cost=int8_cost,
        tol=EXACT,
        keeps_strides=False,
        memory_format=torch.channels_last,
        test_shapes=INT8_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=INT8,
        regimes=int8_regimes,
    ),
)
