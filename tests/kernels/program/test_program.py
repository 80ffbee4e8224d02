"""Kernels that run one after another in one call: what they read, and the memory between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.program.cpu import Program, kernels
from gs_kernels.program.recording import KernelCall, recording
from gs_kernels.requantize.cpu import add_codes
from gs_kernels.requantize.grid import make_grid
from gs_kernels.requantize.passes import channels_last, sum_codes_of, to_codes_of
from gs_kernels.runtime.dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET or kernels() is None, reason="compiled for the CPU")
GRID = (8.0, 0.0, 3.0, -128.0, 127.0)
COUNT = 1000


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    noted: list[Any] = []
    recording.calls = noted
    yield noted
    recording.calls = None


def images(*size: int) -> Tensor:
    return torch.randint(-128, 128, size, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def chain(x: Tensor, length: int) -> Tensor:
    """Sums of codes, each of the two before it: no more than three are needed at a time."""
    quantize, add = to_codes_of(COUNT, GRID, 0), sum_codes_of((0.125, 3.0), (0.25, 3.0), "none", GRID)
    assert quantize is not None and add is not None
    a = quantize(x)
    b = add(a, None)
    for _ in range(length):
        a, b = b, add(a, b)
    return b


def test_memory_is_used_again_once_it_was_read(calls: list[Any]):
    x = torch.linspace(-9, 9, COUNT)
    y = chain(x, 20)
    program = Program(calls, [x], [y])
    assert len(calls) == 22 and program.scratch <= 3 * (COUNT + 128)
    scratch = torch.full((program.scratch,), 77, dtype=torch.uint8)
    (got,) = program([x], scratch)
    assert torch.equal(got, y)
    (other,) = program([-x], scratch)
    assert torch.equal(other, chain(-x, 20)) and torch.equal(got, y)


@pytest.mark.parametrize("ahead", [0, 35000])  # numbers that lie before the summand, and are not needed any more
@pytest.mark.parametrize("to_codes", [True, False])
@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("count", [1, 4097, 70001])
def test_a_sum_on_two_grids_takes_no_memory_that_is_still_read(
    calls: list[Any], count: int, is_kept: bool, to_codes: bool, ahead: int
):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 5
    quantize, add = to_codes_of(count, GRID, 0), sum_codes_of((0.125, 3.0), (0.25, 3.0), "relu", GRID)
    again = sum_codes_of((0.125, 3.0), None, "none", (5.0, 0.25, -7.0, -128.0, 127.0) if to_codes else None)
    last = add if to_codes else to_codes_of(count, GRID, 0)
    assert quantize is not None and add is not None and again is not None and last is not None
    if ahead:
        early, small = torch.ones(ahead), to_codes_of(ahead, GRID, 0)
        assert small is not None
        early_codes = small(early)
    codes = quantize(x)
    if ahead:
        used = add(early_codes, None)
    y = add(codes, codes)
    z = again(y, None)
    w = last(z, y) if to_codes else last(z)  # type: ignore[call-arg]
    want = ((codes.double() - 3) * 0.375).relu()
    assert torch.equal(y, (want.float() * 8 + 0).round().add(3).clamp(-128, 127).to(torch.int8))
    wanted = [w, *([y] if is_kept else []), *([used] if ahead else [])]
    program = Program(calls, [x, *([early] if ahead else [])], wanted)
    scratch = torch.full((program.scratch,), 77, dtype=torch.uint8)
    for got, one in zip(program([x, *([early] if ahead else [])], scratch), wanted, strict=True):
        assert torch.equal(got, one)


def test_a_call_that_reads_what_nobody_wrote_is_refused(calls: list[Any]):
    x = torch.linspace(-9, 9, COUNT)
    y = chain(x, 2)
    for some, given in ((calls, []), (calls[1:], [x]), ([calls[2], *calls[:2]], [x])):
        with pytest.raises(UnsuitableError, match="a call reads what no call wrote"):
            Program(some, given, [y])


def test_only_who_records_notes_calls(calls: list[Any]):
    codes = images(2, 3, 5, 7)
    channels_last(codes)
    recording.calls = None
    channels_last(codes)
    assert len(calls) == 1 and isinstance(calls[0], KernelCall)


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 3, 64, 97), (2, 4, 37, 41), (3, 17, 9, 11), (1, 5000, 2, 3)]
)
def test_images_get_their_channels_last(size: tuple[int, ...]):
    codes = images(*size)
    got = channels_last(codes)
    assert torch.equal(got, codes) and got.is_contiguous(memory_format=torch.channels_last)
    strided = images(*size[:3], 2 * size[3])[..., ::2]
    assert torch.equal(channels_last(strided), strided)


def test_the_copy_of_a_summand_in_another_memory_order_is_noted(calls: list[Any]):
    a, b = images(2, 4, 5, 6).to(memory_format=torch.channels_last), images(2, 4, 5, 6)
    grid = make_grid(torch.tensor([0.125]), torch.tensor([3.0]))
    y = add_codes((a, grid), (b, grid), "none", torch.float32, grid)
    copied, added = calls
    assert copied.args == (b,) and added.other is copied.y and added.y is y
    again = copied.func(*copied.args)
    assert torch.equal(again, b) and again.stride() == a.stride()
