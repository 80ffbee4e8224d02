"""Fake-quant in C++ gives the bits of the reference, with every set of instructions, dtype and layout of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gs_kernels.cpu import compile, library
from gs_kernels.fake_quant import cpu
from gs_kernels.fake_quant.as_ops import plain_backward, plain_dequantize, plain_fake_quant, plain_quantize
from gs_kernels.formats import granularity_of
from gs_kernels.observe.ref import minmax_ref
from gs_kernels.runtime import instructions
from tests.helpers import INTERPRET, relative_rms

pytestmark = pytest.mark.skipif(INTERPRET or cpu.kernels() is None, reason="runs the C++")
NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# x of `drawn`, axis, group
LAYOUTS: dict[str, tuple[Any, int, int]] = {
    "tensor": (lambda x: x(9000), -1, 0),
    "slices by tensor": (lambda x: x(37, 60)[:, 3:50], -1, 0),
    "rows": (lambda x: x(7, 4099), 0, 0),
    "short rows": (lambda x: x(600, 9), 0, 0),
    "slices by row": (lambda x: x(37, 60)[:, 3:50], 0, 0),
    "columns": (lambda x: x(90, 523), 1, 0),
    "slices by column": (lambda x: x(37, 60)[:, 3:50], 1, 0),
    "channels of a picture": (lambda x: x(2, 5, 7, 9), 1, 0),
    "channels last": (lambda x: x(2, 37, 7, 9).to(memory_format=torch.channels_last), 1, 0),
    "groups": (lambda x: x(5, 96), -1, 32),
    "groups across the memory order": (lambda x: x(4, 8, 2, 2).to(memory_format=torch.channels_last), -1, 8),
    "every other": (lambda x: x(30, 30)[::2, ::2], 0, 0),
}


@pytest.fixture(params=compile.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not all(map(instructions.has, instructions.REQUIRED[request.param])):
        pytest.skip(f"this CPU has no {request.param}")
    declared, found = cpu.kernels(), library.open_library(library.path_of(request.param))
    for name in cpu.FUNCTIONS:
        getattr(found, name).argtypes, getattr(found, name).restype = getattr(declared, name).argtypes, None
    monkeypatch.setattr(cpu, "kernels", lambda: found)
    return request.param


def drawn(
    layout: str, dtype: torch.dtype, generator: torch.Generator, more: tuple[float, ...] = ()
) -> tuple[Tensor, tuple[Tensor, Tensor], int, int]:
    """x with ties and some of `more`, a scale and a zero point with a fraction for each channel, axis and group."""

    def values(*sizes: int) -> Tensor:
        x = torch.randn(sizes, generator=generator).mul_(3)
        x.view(-1)[::5] = x.view(-1)[::5].mul(4).round().div(8)
        for i, value in enumerate(more):
            x.view(-1)[7 * i + 3 :: 131] = value
        return x.to(dtype)

    make, axis, group = LAYOUTS[layout]
    x = make(values)
    n = x.numel() // group if group else x.shape[axis] if axis >= 0 else 1
    scale = torch.rand(n, generator=generator) * 0.5 + 0.1
    return x, (scale, torch.rand(n, generator=generator) * 9 - 4), axis, group


def bits(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=12345.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_codes_and_ranges_are_those_of_the_reference(layout, dtype, instruction_set, generator):
    x, grid, axis, group = drawn(layout, dtype, generator, (NAN, INF, -INF, 6e4, -0.0))
    y = cpu.fake_quant_cpu(x, *grid, -9, 20, axis, group)
    want = plain_fake_quant(x, *grid, -9, 20, axis, group)
    assert torch.equal(bits(y), bits(want)) and y.stride() == want.stride() and y.dtype == dtype
    for low, high in ((-100, 20), (0, 255)):
        codes = cpu.quantize_cpu(x, *grid, low, high, axis, group)
        assert torch.equal(codes, plain_quantize(x, *grid, low, high, axis, group))
        back = cpu.dequantize_cpu(codes, *grid, axis, group, dtype)
        assert torch.equal(back, plain_dequantize(codes, *grid, axis, group, dtype))
    wanted = minmax_ref(x, granularity=granularity_of(axis, group))
    for found, limit in zip(cpu.range_cpu(x, axis, group), wanted, strict=True):
        assert torch.equal(bits(found), bits(limit))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_reference(layout, dtype, instruction_set, generator):
    x, grid, axis, group = drawn(layout, dtype, generator)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    wanted = plain_backward(dy, x, *grid, -9, 20, axis, group, True, True)
    for for_scale, for_zero in ((False, False), (True, False), (True, True)):
        dx, *sums = cpu.fake_quant_backward_cpu(dy, x, *grid, -9, 20, axis, group, for_scale, for_zero)
        assert torch.equal(dx, wanted[0]) and dx.stride() == wanted[0].stride()
        for found, want, asked in zip(sums, wanted[1:], (for_scale, for_zero), strict=True):
            assert relative_rms(found, want) < 1e-6 if asked else found.numel() == 0


def test_every_half_is_read_and_written_as_torch_does(instruction_set):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    dx, *_ = cpu.fake_quant_backward_cpu(
        every, torch.zeros_like(every), torch.ones(1), torch.zeros(1), -8, 7, -1, 0, False, False
    )
    assert torch.equal(bits(dx), bits(every))
    x = torch.linspace(-3e4, 3e4, 50001)  # of all exponents of fp16, and below
    for scale in (2.0**-27, 1e-6, 1e-3, 0.37, 40.0):
        grid = torch.tensor([scale]), torch.zeros(1), -(1 << 16), 1 << 16, -1, 0
        for dtype in FLOATS[1:]:
            small = (x * scale).to(dtype)
            assert torch.equal(cpu.fake_quant_cpu(small, *grid), plain_fake_quant(small, *grid))


def test_sums_of_gradients_do_not_depend_on_the_number_of_threads(generator):
    x, dy = torch.randn(2, 300, 211, generator=generator)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums.append(
                [
                    cpu.fake_quant_backward_cpu(dy, x, torch.ones(n), torch.zeros(n), -2, 1, axis, 0, True, True)[1]
                    for n, axis in ((1, -1), (300, 0), (211, 1))
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*sums, strict=True))


@pytest.mark.parametrize("layout", ["rows", "channels last"])
def test_references_run_where_the_library_does_not(layout, generator, monkeypatch):
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    x, grid, axis, group = drawn(layout, torch.float32, generator)
    x.requires_grad_()
    y = torch.ops.gs_kernels.fake_quant(x, *grid, -9, 20, axis, group, "")
    dy = torch.ones_like(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, plain_fake_quant(x, *grid, -9, 20, axis, group)) and y.stride() == x.stride()
    assert torch.equal(dx, plain_backward(dy, x, *grid, -9, 20, axis, group, False, False)[0])
