"""Facts of scoring candidates beyond the reference: worked examples, the correlation, rows in parts, errors."""

import pytest
import torch

from gs_kernels import PerTensor, fake_quant, score_candidates
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.score_candidates import cpu, spec
from tests.helpers import DEVICE

GRID = {"qmin": -8, "qmax": 7}


def tensor(*values):
    return torch.tensor(values, device=DEVICE)


def test_errors_of_outputs_are_squared_and_summed_over_rows():
    x, w = tensor([0.6], [1.0], [-0.2]), tensor([1.0], [-2.0])
    scores = score_candidates(x, tensor(1.0, 0.2), tensor(0.0, 0.0), w, x @ w.T, **GRID)
    # rounded to 1, 1 and 0: errors 0.4, 0, 0.2; on the finer grid there are none
    torch.testing.assert_close(scores[0], tensor([0.2, 0.8], [0.0, 0.0]), rtol=1e-5, atol=1e-6)
    counts = tensor([1.0, 0.0], [1.0, 1.0], [0.0, 0.5])
    weighed = score_candidates(x, tensor(1.0), tensor(0.0), w, x @ w.T, counts, **GRID)
    torch.testing.assert_close(weighed[0], tensor([0.16, 0.04]), rtol=1e-5, atol=1e-6)


def test_the_sums_give_the_correlation_of_outputs():
    case = spec.make(spec.shape(40, 9, 3, 2, pearson=True), torch.float32, DEVICE, torch.Generator(DEVICE))
    x, scale, zero, w, target, _ = case.args
    t, y, tt, yy, ty = score_candidates(*case.args, **case.kwargs).double()
    found = (40 * ty - t * y) / ((40 * tt - t**2) * (40 * yy - y**2)).sqrt()
    for i in range(2):
        grid = {"qmin": -128, "qmax": 127, "granularity": PerTensor()}
        outputs = fake_quant(x, scale[i : i + 1], zero[i : i + 1], **grid) @ w.T
        for n in range(3):
            want = torch.corrcoef(torch.stack([target[:, n], outputs[:, n]]))[0, 1]
            assert float(found[i, n]) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
def test_rows_in_parts_give_the_sums_of_all(monkeypatch):
    case = spec.make(spec.shape(50, 9, 3, 2, weighed=True), torch.float32, torch.device("cpu"), torch.Generator())
    want = score_candidates(*case.args, **case.kwargs)
    monkeypatch.setattr(cpu, "ROWS", 16)
    torch.testing.assert_close(score_candidates(*case.args, **case.kwargs), want, rtol=1e-5, atol=1e-5)


X, ONE, W, Y = torch.ones(3, 2), torch.ones(1), torch.ones(4, 2), torch.ones(3, 4)


@pytest.mark.parametrize(
    "error, words, arguments, more",
    [
        (ValueError, r"x must be \[M, K\], got \[2\]", (torch.ones(2), ONE, ONE, W, Y), {}),
        (ValueError, r"zero must have shape \[1\], got \[2\]", (X, ONE, torch.ones(2), W, Y), {}),
        (TypeError, "w must be float32, got float16", (X, ONE, ONE, W.half(), Y), {}),
        (ValueError, r"w must have shape \[4, 2\], got \[4, 3\]", (X, ONE, ONE, torch.ones(4, 3), Y), {}),
        (ValueError, r"target must have shape \[3, 4\]", (X, ONE, ONE, W, Y.T), {}),
        (ValueError, "at least one candidate and output, got 0", (X, ONE[:0], ONE[:0], W, Y), {}),
        (ValueError, "importance must be None with pearson", (X, ONE, ONE, W, Y, Y), {"pearson": True}),
        (ValueError, "target must be on the device of x", (X, ONE, ONE, W, Y.to("meta")), {}),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments, more):
    with pytest.raises(error, match=words):
        score_candidates(*arguments, **GRID, **more)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck():
    case = spec.make(spec.shape(3, 5, 4, 2, weighed=True), torch.float32, DEVICE, torch.Generator(DEVICE))
    *tensors, importance = case.args
    for counts, pearson in ((importance, False), (None, True)):
        arguments = (*tensors, counts, -8, 7, pearson, "")
        torch.library.opcheck(torch.ops.gs_kernels.score_candidates.default, arguments)
