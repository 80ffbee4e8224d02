"""Makes the plan: steps in order of worth, each with the seconds it has in a run of `SECONDS`, and its items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import ceilings, contact, decoding
from bench.gpu.items import Item
from bench.gpu.tiles import Tune
from bench.gpu.timed import Forced, Kernels, Timed
from bench.run import Job
from bench.shapes import NETWORKS, Layer
from gs_kernels.qconv2d.spec import shape as conv_shape
from gs_kernels.qmatmul.spec import shape as product_shape
from gs_kernels.runtime.opspec import Shape, specs
from gs_kernels.slb.spec import shape as slb_shape

SECONDS = 400.0  # of a whole run; one of other length has steps in proportion
TABLE_SECONDS = 10.0  # of them, kept for the table

BF16 = torch.bfloat16
LAYERS = ((14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # (N, K) of Llama 3 8B and 70B
GEMLITE = LAYERS[:2]  # that its table of an H100 has, at 4 bits
TINYGEMM_ROWS = 64  # with more it is no library that anyone would take
CONVOLUTIONS = (
    Layer(64, 64, 56, 3),
    Layer(128, 128, 28, 3),
    Layer(256, 256, 14, 3),
    Layer(512, 512, 7, 3),
    Layer(256, 64, 56),
    Layer(64, 256, 56),
    Layer(2048, 512, 7),
    Layer(3, 64, 224, 7, 2),
)
assert set(CONVOLUTIONS) <= set(NETWORKS["resnet50"])
BATCH = 32
BLOCK_256 = {
    "dense": False,
    "scale_parts": False,
    "block_m": 256,
    "block_n": 128,
    "warps": 8,
    "stages": 3,
    "programs": 0,
}


@dataclass(frozen=True)
class Step:
    """seconds: of `SECONDS`. tests: whether its items are the conformance tests, which pytest collects.

    fresh: whether it needs a process that has read no table of tiles.
    """

    name: str
    seconds: float
    items: tuple[Item, ...] = ()
    tests: bool = False
    fresh: bool = False


def _timed(step: str, op: str, text: str, about: Shape, *beside: str, direction: str = "fwd") -> Timed:
    spec = next(spec for spec in specs() if spec.name == op)
    dtype = BF16 if BF16 in spec.tol else torch.float32
    return Timed(
        f"{step}/{op} {text}{'' if direction == 'fwd' else ' f+b'}",
        op,
        about.get("bits", 0),
        Job(spec, step, about, dtype, direction),
        beside,
    )


def _product(step: str, op: str, n: int, k: int, m: int, bits: int, group: int, *beside: str) -> Timed:
    about = product_shape((m, k), n, bits, group or k, bias=False)
    text = f"{n}x{k} m={m} w{bits}" + ("" if group == 128 else " channel")
    return _timed(step, op, text, about, *beside)


def w4(step: str = "w4", layers: Any = LAYERS, rows: Any = (1, 16, 64, 256, 1024)) -> Iterator[Item]:
    for n, k in layers:
        for m in rows:
            beside = ["float_linear"]
            beside += ["tinygemm"] if m <= TINYGEMM_ROWS else []
            beside += ["gemlite"] if (n, k) in GEMLITE else []
            yield _product(step, "qmatmul", n, k, m, 4, 128, *beside)


def w2_w1() -> Iterator[Item]:
    for bits in (2, 1):
        for n, k in LAYERS:
            for m in (1, 16, 64, 256):
                yield _product("w2-w1", "qmatmul", n, k, m, bits, 128, "float_linear")


def w4a8() -> Iterator[Item]:
    for n, k in (LAYERS[0], LAYERS[2]):
        for m in (64, 256, 1024, 4096):
            yield _product("w4a8", "qmatmul_fp8", n, k, m, 4, 128, "float_linear")
            yield _product("w4a8", "qmatmul_fp8", n, k, m, 4, 0, "scaled_mm")
            yield _product("w4a8", "qmatmul_int8", n, k, m, 4, 0)


def elements() -> Iterator[Item]:
    known = {spec.name: spec for spec in specs()}
    for about, text in zip(known["fake_quant"].bench_shapes["64M"], ("row", "group", "tensor"), strict=True):
        for direction in ("fwd", "f+b"):
            yield _timed("elements", "fake_quant", f"64M {text}", about, direction=direction)
    yield _timed("elements", "minmax", "51M tensor", known["minmax"].bench_shapes["resnet50"][0])
    for levels, bits in ((16, 4), (4, 2), (1, 1)):
        for direction in ("fwd", "f+b"):
            about = slb_shape((4096, levels, 4096), scaled=False)
            yield _timed("elements", "slb_weight", f"4096x4096 {bits}-bit", about, direction=direction)


def convolutions() -> Iterator[Item]:
    for layer in CONVOLUTIONS:
        about: dict[str, Any] = {"stride": layer.stride, "padding": layer.kernel // 2, "bias": False}
        x, text = (
            (BATCH, layer.c, layer.size, layer.size),
            f"{layer.c}->{layer.o} {layer.kernel}x{layer.kernel} {layer.size}",
        )
        float_x = conv_shape(x, layer.o, layer.kernel, 4, **about)
        yield _timed("conv", "qconv2d", f"{text} w4", float_x, "float_conv2d")
        int8_x = conv_shape(x, layer.o, layer.kernel, 8, out=True, x_zero=True, **about)
        yield _timed("conv", "qconv2d_int8", f"{text} w8", int8_x)


def tunings() -> Iterator[Item]:
    for bits, layers in ((4, LAYERS), (2, LAYERS[::3]), (1, LAYERS[::3])):
        for n, k in layers:
            for m in (1, 16, 64, 256):
                problem = {"m": m, "n": n, "k": k, "bits": bits}
                yield Tune(f"tuner/qmatmul {n}x{k} m={m} w{bits}", "qmatmul", bits, problem)
        if bits == 4:
            for m in (64, 256, 1024):
                problem = {"m": m, "n": LAYERS[0][0], "k": LAYERS[0][1], "group": 128}
                yield Tune(f"tuner/qmatmul_int8 {LAYERS[0][0]}x{LAYERS[0][1]} m={m}", "qmatmul_int8", 4, problem)


def again() -> Iterator[Item]:
    """Yields the most important rows with the new table, then what they are made of."""
    yield from w4("again", LAYERS[::3], (1, 16, 64, 256))
    yield from w4("again", LAYERS[1:3], (1, 16))
    for item in w4("kernels", LAYERS[:1], (1, 16, 64, 256)):
        assert isinstance(item, Timed)
        yield Kernels(item.id, item.op, item.bits, item.job)
    for m in (256, 1024):
        n, k = LAYERS[0]
        problem = {"m": m, "n": n, "k": k, "bits": 4}
        yield Forced(f"again/block_m=256 {n}x{k} m={m}", "qmatmul", 4, problem, (BLOCK_256,))


def steps() -> tuple[Step, ...]:
    """Returns the plan, the steps that are worth most first."""
    return (
        Step("ceilings", 12, ceilings.ITEMS),
        Step("contact", 18, contact.ITEMS),
        Step("conformance", 65, tests=True),
        Step("w4", 55, tuple(w4())),
        Step("w2-w1", 40, tuple(w2_w1())),
        Step("w4a8", 25, tuple(w4a8())),
        Step("elements", 25, tuple(elements())),
        Step("conv", 35, tuple(convolutions())),
        Step("decode", 30, decoding.ITEMS),
        Step("tuner", 45, tuple(tunings())),
        Step("again", 40, tuple(again()), fresh=True),
    )
