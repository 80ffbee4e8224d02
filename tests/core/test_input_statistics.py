"""Sums over tokens of a layer's input: their values, in any number of batches and processes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gs_algos.core.input_statistics import InputStatistics
from tests.helpers import same_bits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gathered(*pieces: Tensor) -> InputStatistics:
    sums = InputStatistics(pieces[0].shape[-1])
    for piece in pieces:
        sums.update(piece)
    return sums


def test_second_moments_drift_and_extremes_are_sums_over_tokens():
    x, floats = random(50, 6), random(50, 6, seed=1)
    sums = InputStatistics(6, cross=True)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 50)):
        sums.update(x[rows], floats[rows])
    torch.testing.assert_close(sums.gram[0], x.T @ x)
    torch.testing.assert_close(sums.cross[0], (floats - x).T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.mean[0], x.mean(0))
    torch.testing.assert_close(sums.absmean[0], x.abs().mean(0))
    assert same_bits(sums.absmax[0], x.abs().amax(0))
    assert sums.count == 50


def test_each_group_of_a_convolution_has_sums_of_its_own():
    x = random(3, 50, 6)
    sums = InputStatistics(6, groups=3)
    sums.update(x)
    torch.testing.assert_close(sums.gram, x.mT @ x)
    torch.testing.assert_close(sums.mean, x.mean(1))
    assert sums.count == 50


def test_halves_are_summed_in_fp32():
    x = random(200, 6).bfloat16()
    assert same_bits(gathered(x).gram, gathered(x.float()).gram)


def test_without_a_token_means_are_zero():
    sums = InputStatistics(4)
    assert (sums.count, float(sums.mean.abs().max()), float(sums.absmean.max())) == (0, 0.0, 0.0)


def test_processes_add_their_sums(monkeypatch: pytest.MonkeyPatch):
    def as_of_two(t: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, group: object = None) -> None:
        """Acts as two processes that have the same."""
        t.mul_(2 if op == dist.ReduceOp.SUM else 1)

    monkeypatch.setattr(dist, "all_reduce", as_of_two)
    x, floats = random(20, 6), random(20, 6, seed=1)
    one, both = (InputStatistics(6, cross=True) for _ in range(2))
    one.update(x, floats)
    one.all_reduce()
    both.update(x, floats)
    both.update(x, floats)
    for name in ("gram", "cross", "mean", "absmean", "absmax"):
        torch.testing.assert_close(getattr(one, name), getattr(both, name))
    assert one.count == both.count == 40


def test_what_is_derived_is_made_once_and_anew_after_more_tokens():
    sums, made = gathered(random(5, 3)), []
    for _ in range(2):
        sums.once("trace", lambda: made.append(float(sums.gram[0].trace())))
    sums.update(random(5, 3, seed=1))
    sums.once("trace", lambda: made.append(float(sums.gram[0].trace())))
    assert len(made) == 2 and made[1] > made[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_found(value: float):
    x = random(5, 4)
    x[2, 1] = value
    with pytest.raises(
        ValueError, match=r"up: the inputs .* must be finite, got NaN or Inf, .* in 1 of 4 columns \(1\)"
    ):
        gathered(random(5, 4), x).check("up")


def test_float_inputs_that_are_not_finite_are_found():
    sums = InputStatistics(4, cross=True)
    sums.update(random(5, 4), torch.tensor([[0.0, 0.0, torch.nan, 0.0]]).expand(5, 4))
    with pytest.raises(ValueError, match=r"up: the inputs .* must be finite, .* in 1 of 4 columns \(2\)"):
        sums.check("up")


@pytest.mark.parametrize(
    ("groups", "cross", "shapes", "words"),
    [
        (1, False, [(5, 3)], r"rows must be \[T, 4\], got \[5, 3\]"),
        (2, False, [(5, 4)], r"rows must be \[2, T, 4\], got \[5, 4\]"),
        (2, False, [(3, 5, 4)], r"rows must be \[2, T, 4\], got \[3, 5, 4\]"),
        (1, True, [(5, 4)], "update must get floats with cross=True, got none"),
        (1, False, [(5, 4), (5, 4)], "update must get no floats with cross=False, got some"),
        (1, True, [(5, 4), (6, 4)], r"quantized and floats must have one shape, got \[5, 4\] and \[6, 4\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused(groups: int, cross: bool, shapes: list[tuple[int, ...]], words: str):
    with pytest.raises(ValueError, match=words):
        InputStatistics(4, groups, cross).update(*(torch.ones(shape) for shape in shapes))
