"""Facts of scoring candidates beyond the reference: worked examples, rows in parts, errors."""

import pytest
import torch

from gs_kernels import score_candidates
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.score_candidates import cpu, spec
from tests.helpers import DEVICE

GRID = {"qmin": -8, "qmax": 7}


def tensor(*values):
    return torch.tensor(values, device=DEVICE)


def test_errors_of_outputs_are_squared_and_summed_over_rows():
    x, w = tensor([0.6], [1.0], [-0.2]), tensor([1.0], [-2.0])
    once = torch.ones(3, 2, device=DEVICE)
    scores = score_candidates(x, tensor(1.0, 0.2), tensor(0.0, 0.0), w, x @ w.T, once, **GRID)
    # rounded to 1, 1 and 0: errors 0.4, 0, 0.2; on the finer grid there are none
    torch.testing.assert_close(scores, tensor([0.2, 0.8], [0.0, 0.0]), rtol=1e-5, atol=1e-6)
    counts = tensor([1.0, 0.0], [1.0, 1.0], [0.0, 0.5])
    weighed = score_candidates(x, tensor(1.0), tensor(0.0), w, x @ w.T, counts, **GRID)
    torch.testing.assert_close(weighed, tensor([0.16, 0.04]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
def test_rows_in_parts_give_the_sums_of_all(monkeypatch):
    case = spec.make(spec.shape(50, 9, 3, 2), torch.float32, torch.device("cpu"), torch.Generator())
    want = score_candidates(*case.args, **case.kwargs)
    monkeypatch.setattr(cpu, "ROWS", 16)
    torch.testing.assert_close(score_candidates(*case.args, **case.kwargs), want, rtol=1e-5, atol=1e-5)


X, ONE, W, Y = torch.ones(3, 2), torch.ones(1), torch.ones(4, 2), torch.ones(3, 4)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, r"x must be \[M, K\], got \[2\]", (torch.ones(2), ONE, ONE, W, Y, Y)),
        (ValueError, r"zero must have shape \[1\], got \[2\]", (X, ONE, torch.ones(2), W, Y, Y)),
        (TypeError, "w must be float32, got float16", (X, ONE, ONE, W.half(), Y, Y)),
        (ValueError, r"w must have shape \[4, 2\], got \[4, 3\]", (X, ONE, ONE, torch.ones(4, 3), Y, Y)),
        (ValueError, r"target must have shape \[3, 4\]", (X, ONE, ONE, W, Y.T, Y)),
        (ValueError, r"importance must have shape \[3, 4\]", (X, ONE, ONE, W, Y, Y.T)),
        (ValueError, "at least one candidate and output, got 0", (X, ONE[:0], ONE[:0], W, Y, Y)),
        (ValueError, "target must be on the device of x", (X, ONE, ONE, W, Y.to("meta"), Y)),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments):
    with pytest.raises(error, match=words):
        score_candidates(*arguments, **GRID)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck():
    case = spec.make(spec.shape(3, 5, 4, 2), torch.float32, DEVICE, torch.Generator(DEVICE))
    torch.library.opcheck(torch.ops.gs_kernels.score_candidates.default, (*case.args, -8, 7, ""))
