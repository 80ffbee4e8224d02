"""Facts of searching clip ratios beyond the reference: worked examples, ties, rows that are not finite, errors."""

import pytest
import torch

from gs_kernels import search_clip_ratio
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.search_clip_ratio import cpu, spec
from tests.helpers import DEVICE

GRID = {"qmin": -8, "qmax": 7, "symmetric": True}


def tensor(*values):
    return torch.tensor(values, device=DEVICE)


def test_a_range_is_clipped_where_that_loses_less():
    rows = torch.linspace(-1, 1, 401, device=DEVICE).repeat(2, 1)
    rows[1, -1] = 4.0
    # of the second, sums of errors about 400 * step^2 / 12 + (4 - 7 * step)^2: 9.5, 6.9 and 10.0
    assert search_clip_ratio(rows, tensor(1.0, 0.5, 0.25), **GRID).tolist() == [1.0, 0.5]


def test_what_counts_for_nothing_is_clipped_away():
    row, counts = tensor(1.0, -1.0, 0.5, 8.0)[None], tensor(1.0, 1.0, 1.0, 0.0)[None]
    assert search_clip_ratio(row, tensor(1.0, 0.125), counts, **GRID).tolist() == [0.125]


def test_of_equal_errors_the_first_ratio_wins():
    zeros = torch.zeros(3, 5, device=DEVICE)
    assert search_clip_ratio(zeros, tensor(0.8, 1.0, 0.5), **GRID).tolist() == [pytest.approx(0.8)] * 3


def test_rows_that_are_not_finite_are_not_clipped():
    rows = tensor([1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, -float("inf"), 2.0])
    assert search_clip_ratio(rows, tensor(0.5, 0.3), **GRID).tolist() == [1.0, 1.0, 1.0]


def test_a_row_longer_than_a_program_holds_is_searched():
    row = torch.linspace(-1, 1, 20001, device=DEVICE)[None].clone()
    row[0, -1] = 8.0
    assert search_clip_ratio(row, tensor(1.0, 0.125), **GRID).tolist() == [0.125]


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
def test_the_way_without_a_compiler_finds_the_same(monkeypatch):
    case = spec.make(spec.shape(40, 64, weighed=True), torch.float32, torch.device("cpu"), torch.Generator())
    want = search_clip_ratio(*case.args, **case.kwargs)
    assert cpu.kernels() is not None
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    assert torch.equal(search_clip_ratio(*case.args, **case.kwargs), want)


X, RATIOS = torch.ones(2, 3), torch.ones(4)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, r"x must be \[C, n\], got \[3\]", (torch.ones(3), RATIOS)),
        (TypeError, "x must be one of float32, float16, bfloat16, got int32", (X.int(), RATIOS)),
        (ValueError, "ratios must hold at least one", (X, torch.ones(0))),
        (TypeError, "ratios must be float32, got float64", (X, RATIOS.double())),
        (ValueError, r"importance must have shape \[2, 3\]", (X, RATIOS, torch.ones(3))),
        (ValueError, "importance must be on the device of x", (X, RATIOS, torch.ones(2, 3, device="meta"))),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments):
    with pytest.raises(error, match=words):
        search_clip_ratio(*arguments, **GRID)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck():
    x, ratios, importance = spec.make(
        spec.shape(3, 5, weighed=True), torch.float32, DEVICE, torch.Generator(DEVICE)
    ).args
    for counts in (None, importance):
        torch.library.opcheck(torch.ops.gs_kernels.search_clip_ratio.default, (x, ratios, counts, -8, 7, True, ""))
