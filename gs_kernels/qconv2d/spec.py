"""Tells tests, the AOT gate and the benchmarks what to run of convolutions with packed weights.

A shape is `x` (B, C, H, W), `n` (channels of y), the geometry as `torch.nn.Conv2d` has it, `bits`, `group`, `zero` and
`activation` as for products (gs_kernels/qmatmul/spec.py), `residual`: None, "float" or, for 8-bit images, "int8",
`x_zero`: whether x has a zero point, and `out`: whether y is codes; with both, sums of codes were made before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.qconv2d.aot_cases import INT8, QCONV2D, int8_regimes, regimes
from gs_kernels.qconv2d.geometry import ConvGeometry, make_geometry
from gs_kernels.qconv2d.op import qconv2d
from gs_kernels.qconv2d.op_int8 import qconv2d_int8
from gs_kernels.qconv2d.ref import qconv2d_int8_ref, qconv2d_ref
from gs_kernels.qmatmul.op_int8 import code_sums
from gs_kernels.qmatmul.spec import EXACT, GRAD_TOL, TOL, make_weight
from gs_kernels.runtime.opspec import Case, Cost, OpSpec, Shape

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups")


def shape(x: tuple[int, ...], n: int, kernel_size: Any, bits: int, group: int = 0, **more: Any) -> Shape:
    """Describes a case. group: 0 for one scale per channel."""
    fields: Shape = {"x": x, "n": n, "kernel_size": kernel_size, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    fields |= {"bits": bits, "group": group, "zero": "middle", "activation": "none", "bias": True, "residual": None}
    return fields | {"x_zero": False, "out": False, "axis": -1} | more


def _geometry(s: Shape) -> ConvGeometry:
    return make_geometry("spec", **{name: s[name] for name in GEOMETRY})


def _sizes(s: Shape) -> tuple[int, int, tuple[int, ...]]:
    """Returns K, group size and the shape of y."""
    geometry = _geometry(s)
    k = geometry.taps * s["x"][1] // s["groups"]
    return k, s["group"] or k, (s["x"][0], s["n"], *geometry.output(*s["x"][2:]))


def _weight(s: Shape, device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> Any:
    k, group, _ = _sizes(s)
    return make_weight(s | {"x": (1, k), "group": group}, device, generator, dtype)


def _image(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def make(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    draw: dict[str, Any] = {"generator": generator, "device": device}
    x = _image(torch.randn(s["x"], **draw).to(dtype))
    weight = _weight(s, device, generator, dtype)
    kwargs = {name: s[name] for name in (*GEOMETRY, "activation")}
    if s["residual"]:
        kwargs["residual"] = _image(torch.randn(_sizes(s)[2], **draw).to(dtype))
    if not s["bias"]:
        return Case((x, weight), kwargs, (0,))
    return Case((x, weight, torch.randn(s["n"], **draw).to(dtype)), kwargs, (0, 2))


def make_int8(s: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Case:
    draw: dict[str, Any] = {"generator": generator, "device": device}

    def number(low: float, high: float, whole: bool = False) -> Tensor:
        t = torch.rand(1, **draw).mul_(high - low).add_(low)
        return t.round_() if whole else t

    def codes(size: tuple[int, ...]) -> Tensor:
        return _image(torch.randint(-128, 128, size, dtype=torch.int8, **draw))

    x, weight = codes(s["x"]), _weight(s, device, generator, torch.float32)
    kwargs: dict[str, Any] = {name: s[name] for name in (*GEOMETRY, "activation")} | {"dtype": dtype}
    if s["x_zero"]:
        kwargs["x_zero"] = number(-128, 127, whole=True)
    if s["x_zero"] and s["out"]:
        kwargs["code_sums"] = code_sums(weight)  # made once, as between converted layers
    if s["residual"] == "int8":
        kwargs |= {"residual": codes(_sizes(s)[2]), "residual_scale": number(0.01, 0.03)}
        kwargs["residual_zero"] = number(-128, 127, whole=True)
    elif s["residual"]:
        kwargs["residual"] = _image(torch.randn(_sizes(s)[2], **draw).to(dtype))
    if s["out"]:
        kwargs |= {"out_scale": number(0.02, 0.04), "out_zero": number(-40, 40, whole=True)}
    bias = torch.randn(s["n"], **draw) if s["bias"] else None
    return Case((x, number(0.01, 0.02), weight, bias), kwargs)


def _cost(s: Shape, x_bytes: int, y_bytes: int, scale_bytes: int) -> Cost:
    k, group, (b, o, p, q) = _sizes(s)
    batch, c, h, w = s["x"]
    weight = o * k * s["bits"] // 8 + o * (k // group) * scale_bytes
    pixels_read = h * w if _geometry(s).taps > 1 else p * q  # strides leave pixels out
    outputs = b * o * p * q
    residual = outputs * y_bytes if s["residual"] else 0
    return Cost(nbytes=weight + batch * c * pixels_read * x_bytes + outputs * y_bytes + residual, flops=2 * outputs * k)


def cost(s: Shape, dtype: torch.dtype) -> Cost:
    return _cost(s, dtype.itemsize, dtype.itemsize, dtype.itemsize)


def int8_cost(s: Shape, dtype: torch.dtype) -> Cost:
    return _cost(s, 1, 1 if s["out"] else dtype.itemsize, 4)


# bends of an activation are met by rounding: tests/kernels/qconv2d compares those gradients in fp32
# odd channels and sizes, 1 x 1 to 7 x 7, strides, dilation, one-sided padding, groups, single channels, several tiles
TEST_SHAPES = (
    shape((1, 1, 1, 1), 3, 1, 4),
    shape((2, 5, 7, 6), 33, 3, 4, padding=1, activation="silu"),
    shape((1, 128, 4, 5), 65, (2, 3), 2, 128, zero="half", padding="same", dilation=(1, 2), residual="float"),
    shape((1, 3, 17, 15), 16, 7, 8, stride=2, padding=3, bias=False),
    shape((2, 8, 5, 5), 12, 3, 1, zero="half", groups=4, stride=(2, 1), padding=1),
    shape((3, 64, 1, 9), 20, (1, 3), 4, 32, zero="points", padding=(0, 2), activation="gelu"),
    shape((1, 9, 6, 7), 18, 3, 4, groups=9, padding=1, dilation=2, residual="float"),
    shape((1, 256, 9, 9), 70, 1, 4, zero="levels", stride=2, bias=False),
)
INT8_SHAPES = (
    shape((1, 1, 1, 1), 3, 1, 4, x_zero=True),
    shape((2, 5, 7, 6), 33, 3, 4, padding=1, x_zero=True, out=True, activation="hardswish"),
    shape((1, 128, 4, 5), 65, (2, 3), 2, 128, zero="half", padding="same", x_zero=True, residual="int8", out=True),
    shape((1, 3, 17, 15), 16, 7, 8, stride=2, padding=3, activation="relu", x_zero=True, out=True),
    shape((2, 8, 5, 5), 12, 3, 1, groups=4, stride=(2, 1), padding=1, activation="relu6", bias=False),
    shape((3, 64, 1, 9), 20, (1, 3), 4, 96, zero="points", padding=(0, 2), x_zero=True, residual="float"),
    shape((1, 9, 6, 7), 18, 3, 8, groups=9, padding=1, dilation=2, x_zero=True, residual="int8", out=True),
    shape((1, 640, 2, 2), 70, 2, 8, x_zero=True, residual="int8", out=True),
)


# three kinds of layers; the benchmark adds every convolution of whole networks (bench/shapes.py)
_CPU: tuple[dict[str, Any], ...] = tuple(
    {"x": (batch, c, size, size), "n": n, "kernel_size": kernel, "stride": stride, "padding": kernel // 2}
    | {"groups": groups, "bias": False}
    for batch in (1, 8)
    for c, n, size, kernel, stride, groups in (
        (128, 128, 28, 3, 1, 1),
        (64, 256, 56, 1, 1, 1),
        (96, 96, 112, 3, 2, 96),
    )
)
BENCH_SHAPES = {"cpu": tuple(shape(bits=4, **layer) for layer in _CPU)}
INT8_BENCH = {"cpu": tuple(shape(bits=8, out=True, **layer) for layer in _CPU)}

SPECS = (
    OpSpec(
        name="qconv2d",
        run=qconv2d,
        ref=qconv2d_ref,
        make=make,
        cost=cost,
        tol=TOL,
        keeps_strides=False,
        memory_format=torch.channels_last,
        grad_tol=GRAD_TOL,
        test_shapes=TEST_SHAPES,
        bench_shapes=BENCH_SHAPES,
        aot=QCONV2D,
        regimes=regimes,
    ),
    OpSpec(
        name="qconv2d_int8",
        run=qconv2d_int8,
        ref=qconv2d_int8_ref,
        make=make_int8,
        cost=int8_cost,
        tol=EXACT,
        keeps_strides=False,
        memory_format=torch.channels_last,
        test_shapes=INT8_SHAPES,
        bench_shapes=INT8_BENCH,
        aot=INT8,
        regimes=int8_regimes,
    ),
)
