"""Facts of rounding columns in turn beyond the reference: worked examples, the way without a compiler, errors."""

import pytest
import torch

from gs_kernels import gptq_block
from gs_kernels.gptq_block import cpu, spec
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE


def column(*values):
    """Columns of one row."""
    return torch.tensor(values, device=DEVICE).view(-1, 1, 1)


def upper(*rows):
    return torch.tensor(rows, device=DEVICE).unsqueeze(0)


def test_the_error_of_a_column_moves_those_behind_it():
    values = column(0.6, 0.6, 0.6)
    factor = upper((1.0, 0.5, 0.0), (9.0, 1.0, -1.0), (9.0, 9.0, 1.0))
    change = gptq_block(values, values, factor, torch.ones_like(values), qmin=-8, qmax=7)
    # 0.6 -> 1: +0.4; 0.6 - 0.5 * 0.4 = 0.4 -> 0: -0.6; 0.6 - 0.6 = 0 -> 0
    assert (values + change).flatten().tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_ties_round_to_even_on_a_grid_with_zero_points_and_stay_on_it():
    values = column(0.5, 1.5, -9.0, 9.0)
    zero, scale = column(1.0, 1.0, 2.0, 2.0), torch.ones_like(values)
    factor = torch.zeros(1, 4, 4, device=DEVICE)
    change = gptq_block(values, torch.zeros_like(values), factor, scale, zero, qmin=0, qmax=3)
    assert change.flatten().tolist() == [1.0, 1.0, -2.0, 1.0]  # codes 2, 2, 0, 3


def test_a_scale_of_zero_gives_zero_and_a_negative_one_flips_the_grid():
    values, scale = column(5.0, -0.8), column(0.0, -0.1)
    change = gptq_block(values, torch.zeros_like(values), torch.zeros(1, 2, 2, device=DEVICE), scale, qmin=-8, qmax=7)
    assert change.flatten().tolist() == pytest.approx([0.0, -0.7])  # the code 8 is above the grid


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
def test_without_a_compiler_the_bits_are_the_same(monkeypatch):
    case = spec.make(spec.shape(21, 2, 40, zero=True), torch.float32, torch.device("cpu"), torch.Generator())
    want = gptq_block(*case.args, **case.kwargs)
    assert cpu.kernels() is not None
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    assert torch.equal(gptq_block(*case.args, **case.kwargs), want)


def test_no_row_is_no_error():
    empty = torch.empty(4, 1, 0, device=DEVICE)
    assert gptq_block(empty, empty, torch.zeros(1, 4, 4, device=DEVICE), empty, qmin=0, qmax=1).shape == (4, 1, 0)


ROWS, FACTOR = torch.ones(2, 1, 3), torch.ones(1, 2, 2)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, r"values must be \[columns, groups, n\]", (torch.ones(2, 3), ROWS, FACTOR, ROWS)),
        (ValueError, "with 1 to 128 columns", (torch.ones(129, 1, 3), ROWS, FACTOR, ROWS)),
        (ValueError, r"start must have shape \[2, 1, 3\]", (ROWS, torch.ones(2, 1, 1), FACTOR, ROWS)),
        (ValueError, r"factor must have shape \[1, 2, 2\]", (ROWS, ROWS, torch.ones(2, 2), ROWS)),
        (TypeError, "scale must be float32, got float16", (ROWS, ROWS, FACTOR, ROWS.half())),
        (
            ValueError,
            "zero must be on the device of values",
            (ROWS, ROWS, FACTOR, ROWS, torch.ones(2, 1, 3).to("meta")),
        ),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments):
    with pytest.raises(error, match=words):
        gptq_block(*arguments, qmin=-8, qmax=7)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck():
    values, start, factor, scale, zero = spec.make(
        spec.shape(3, 2, 5, zero=True), torch.float32, DEVICE, torch.Generator(DEVICE)
    ).args
    factor = factor.nan_to_num(0.0)
    for given in (zero, None):
        torch.library.opcheck(torch.ops.gs_kernels.gptq_block.default, (values, start, factor, scale, given, -8, 7, ""))
