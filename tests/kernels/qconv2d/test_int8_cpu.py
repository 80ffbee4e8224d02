"""8-bit convolutions on a CPU against the reference, bit for bit: C++ for each set of instructions, and without."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gs_kernels import PackedWeight, pack_weight, qconv2d_int8
from gs_kernels.cpu import library
from gs_kernels.cpu.compile import instruction_sets
from gs_kernels.qconv2d.cpu import int8, int8_kernel
from gs_kernels.qconv2d.ref import qconv2d_int8_ref
from gs_kernels.runtime import instructions
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter runs Triton's kernels instead")

WAYS = [*instruction_sets(), "none"]
GEOMETRIES: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (5, 3), "padding": (2, 0), "stride": (2, 3)},
    "pointwise, strided": {"kernel_size": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 4, "dilation": (2, 3)},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "larger than the image": {"kernel_size": 11, "padding": 5},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instructions that the C++ uses; "none" where there is no library."""
    use(request.param, monkeypatch)
    return str(request.param)


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = None
    if way != "none":
        if not all(map(instructions.has, instructions.REQUIRED[way])):
            pytest.skip(f"this CPU has no {way}")
        functions = library.open_library(library.path_of(way))
        assert functions is not None, "run python -m gs_kernels.cpu.build"
        for name, argtypes in int8_kernel.FUNCTIONS.items():
            getattr(functions, name).argtypes, getattr(functions, name).restype = argtypes, None
    monkeypatch.setattr(int8, "kernels", lambda: functions)
    monkeypatch.setattr(int8_kernel, "kernels", lambda: functions)
    # derived forms of another set must not be found
    monkeypatch.setattr(int8, "derived", lambda weight, kind, build: build(weight))


def taps_of(about: dict[str, Any]) -> int:
    size = about["kernel_size"]
    return size[0] * size[1] if isinstance(size, tuple) else size * size


def weight(rows: int, k: int, bits: int, zero: str = "middle", group_size: int | None = None) -> PackedWeight:
    generator = torch.Generator().manual_seed(rows + k)
    codes = torch.randint(2**bits, (rows, k), generator=generator, dtype=torch.uint8)
    groups = k // (group_size or k)
    scale = torch.linspace(-0.02, 0.03, rows * groups).view(rows, groups)
    middle = torch.full((rows, groups), 2.0 ** (bits - 1))
    moved = torch.randint(0, 2**bits, middle.shape, generator=generator).float()
    zeros = {"middle": middle, "half steps": middle - 0.5, "whole": moved, "fractions": moved + 0.3}[zero]
    return pack_weight(codes, scale, zeros, bits=bits, group_size=group_size or k)


def image(channels: int, batch: int = 2, h: int = 7, w: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(-128, 128, (batch, channels, h, w), generator=generator, dtype=torch.int8)
    x.flatten()[:7] = torch.tensor([-128, 127, -128, 127, -128, -128, 127])[: x.numel()]
    return x


GRID = {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([-100.0])}
VARIANTS: tuple[tuple[str, Tensor | None, dict[str, Tensor]], ...] = (
    ("none", None, {}),
    ("relu", torch.tensor([-7.0]), GRID),
    ("relu6", torch.tensor([-128.0]), GRID),
    ("hardswish", torch.tensor([3.0]), GRID),
)


def check(x: Tensor, w: PackedWeight, bias: Tensor | None, about: dict[str, Any], **more: Any) -> None:
    x_scale = torch.tensor([0.05])
    for activation, zero, out in VARIANTS:
        options = {**about, **out, "x_zero": zero, "activation": activation, **more}
        want = qconv2d_int8_ref(x, x_scale, w, bias, **options)
        assert torch.equal(qconv2d_int8(x, x_scale, w, bias, **options), want), (activation, zero, out)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(qconv2d_int8(last, x_scale, w, bias, **options), want)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "inputs, outputs, bits", [(1, 16, 8), (3, 24, 4), (16, 37, 8), (24, 1, 2), (20, 100, 4), (32, 64, 1)]
)
def test_all_channels(way: str, geometry: str, inputs: int, outputs: int, bits: int):
    about = GEOMETRIES[geometry]
    w = weight(outputs, inputs * taps_of(about), bits)
    check(image(inputs), w, torch.linspace(-3, 3, outputs), about)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "channels, bits, zero", [(16, 8, "middle"), (80, 8, "fractions"), (7, 4, "whole"), (33, 1, "half steps")]
)
def test_depthwise(way: str, geometry: str, channels: int, bits: int, zero: str):
    about = {**GEOMETRIES[geometry], "groups": channels}
    w = weight(channels, taps_of(about), bits, zero)
    check(image(channels), w, torch.linspace(-3, 3, channels), about)


@pytest.mark.parametrize("groups, inputs, outputs", [(2, 6, 40), (4, 4, 8), (3, 12, 51)])
def test_groups_of_channels(way: str, groups: int, inputs: int, outputs: int):
    for about in (GEOMETRIES["padded"], GEOMETRIES["dilated"], GEOMETRIES["pointwise"]):
        w = weight(outputs, inputs // groups * taps_of(about), 4, "whole")
        check(image(inputs), w, None, {**about, "groups": groups})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero", ["half steps", "whole", "fractions"])
@pytest.mark.parametrize("group_size", [None, 16, 48, 12])
def test_zero_points_and_groups_of_the_weight(way: str, bits: int, zero: str, group_size: int | None):
    w = weight(21, 144, bits, zero, group_size)
    check(image(16), w, torch.linspace(-1, 1, 21), GEOMETRIES["padded"])


@pytest.mark.parametrize("zero", [0.25, -131.5, 300.0, -300.75, 5e6, 3e7])
def test_codes_of_any_grid_are_limited_as_the_activation_and_the_grid_say(way: str, zero: float):
    """The limits of both are one where that gives the same; NaN has the least code."""
    out = {"out_scale": torch.tensor([0.04]), "out_zero": torch.tensor([zero])}
    for groups, bias in itertools.product((1, 19), (torch.linspace(-9, 9, 19), torch.full((19,), torch.nan))):
        w, about = weight(19, 19 // groups * 9, 8), {**GEOMETRIES["padded"], "groups": groups}
        for activation, h in itertools.product(("none", "relu", "relu6", "hardswish", "silu"), (1, 6)):
            options = {**about, **out, "x_zero": torch.tensor([3.0]), "activation": activation}
            x, x_scale = image(19, 2, h, 5), torch.tensor([0.01])
            want = qconv2d_int8_ref(x, x_scale, w, bias, **options)
            assert torch.equal(qconv2d_int8(x, x_scale, w, bias, **options), want), (groups, activation, h)


def test_residuals(way: str):
    about, generator = GEOMETRIES["padded"], torch.Generator().manual_seed(2)
    x, w, bias = image(24, 2, 5, 5), weight(37, 216, 8), torch.linspace(-3, 3, 37)
    size = (2, 37, 5, 5)
    codes = torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
    real = torch.randn(size, generator=generator)
    real[0, 0, 0, 0] = torch.nan
    scaled = {"residual_scale": torch.tensor([0.03])}
    for residual, (activation, zero), out in itertools.product(
        (
            {"residual": real},
            {"residual": real.to(torch.bfloat16)},
            {"residual": codes, **scaled},
            {"residual": codes, **scaled, "residual_zero": torch.tensor([9.0])},
        ),
        (("none", None), ("relu", torch.tensor([-7.0])), ("relu6", None), ("hardswish", None)),
        ({}, {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([-100.25])}),
    ):
        options = {**about, "activation": activation, "x_zero": zero, **residual, **out}
        got = qconv2d_int8(x, torch.tensor([0.05]), w, bias, **options)
        want = qconv2d_int8_ref(x, torch.tensor([0.05]), w, bias, **options)
        assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9)), (residual.keys(), activation, out.keys())
    each = weight(24, 9, 8)
    options = {**about, "groups": 24, "residual": torch.ones(2, 24, 5, 5)}
    ends = qconv2d_int8(x, torch.ones(1), each, **options), qconv2d_int8_ref(x, torch.ones(1), each, **options)
    assert torch.equal(*ends)


def test_sums_of_the_ends_of_the_range_are_exact(way: str):
    x, zero = torch.full((1, 16384, 1, 2), 127, dtype=torch.int8), torch.tensor([-128.0])
    w = pack_weight(torch.zeros(2, 16384, dtype=torch.uint8), torch.ones(2, 1), 128.0, bits=8, group_size=16384)
    y = qconv2d_int8(x, torch.ones(1), w, kernel_size=1, x_zero=zero)
    assert y.flatten().tolist() == [-255.0 * 128 * 16384] * 4
    for bits, code, of_zero in ((4, 0, 8.0), (4, 15, 0.0), (4, 15, 0.5), (2, 3, 0.0), (8, 64, 128.0), (8, 255, 0.0)):
        packed = pack_weight(
            torch.full((2, 4096), code, dtype=torch.uint8), torch.ones(2, 1), of_zero, bits=bits, group_size=4096
        )
        y = qconv2d_int8(x[:, :4096], torch.ones(1), packed, kernel_size=1, x_zero=zero)
        assert y.flatten().tolist() == [255.0 * (code - of_zero) * 4096] * 4, (bits, code, of_zero)


def test_other_activations_dtypes_and_no_images(way: str):
    x_scale, about = torch.tensor([0.05]), GEOMETRIES["padded"]
    w, x = weight(32, 72, 8), image(8)
    for options in ({"activation": "silu"}, {"dtype": torch.float16}, {"activation": "gelu", **GRID}):
        got, want = (f(x, x_scale, w, **about, **options) for f in (qconv2d_int8, qconv2d_int8_ref))
        assert got.dtype == want.dtype and relative_rms(got.float(), want.float()) < 1e-3
    assert qconv2d_int8(image(8, 0), x_scale, w, **about).shape == (0, 32, 7, 9)


def test_a_library_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(int8_kernel, "self_test", lambda functions: False)
    monkeypatch.setattr(library, "_problems", {})
    int8_kernel.kernels.cache_clear()
    try:
        w, x = weight(32, 9, 8), image(32)
        about = {"kernel_size": 3, "padding": 1, "groups": 32}
        got = qconv2d_int8(x, torch.ones(1), w, **about)
        assert torch.equal(got, qconv2d_int8_ref(x, torch.ones(1), w, **about))
        assert "8-bit convolutions run as tensor operations" in caplog.text and "wrong results" in caplog.text
    finally:
        int8_kernel.kernels.cache_clear()


@pytest.fixture
def frozen() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_weights_of_inference_mode(frozen: None):
    x, w = image(8), weight(16, 72, 4)
    got = qconv2d_int8(x, torch.ones(1), w, kernel_size=3, padding=1, keep_dense=True)
    assert torch.equal(got, qconv2d_int8_ref(x, torch.ones(1), w, kernel_size=3, padding=1))
