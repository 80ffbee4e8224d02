"""Scales and codes improved together: against plain least squares and a plain loop of coordinate descent in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gs_algos.ptq.refine import LARGEST_CHANGE, refine, refit
from gs_algos.ptq.rounding.gptq import gptq
from gs_algos.ptq.solve import SolveOptions, solve
from gs_algos.ptq.sweep import sweep
from gs_algos.quant.packed.grid import Grid, grid_of
from tests.helpers import same_bits
from tests.ptq.test_solve import SCHEMES, inputs, prepared, random, scheme, statistics


def loss(error: Tensor, damped: Tensor) -> float:
    """tr(E H E^T) in float64; damped `[K, K]`."""
    return float(((error.double() @ damped.double()) * error.double()).sum())


def rounded(text: str, n: int = 24, k: int = 96) -> tuple[Tensor, Grid, Tensor, Tensor]:
    """(weight, grid, codes of gptq, damped `[1, k, k]`)."""
    weight, hessian = random(n, k), prepared(statistics(inputs(400, k)))
    grid = grid_of(weight, scheme(text))
    return weight, grid, gptq(weight, grid, hessian), hessian.damped


def plain_descent(weight: Tensor, values: Tensor, grid: Grid, damped: Tensor) -> Tensor:
    """One pass over the columns in float64, the whole of e H anew for each."""
    q, w, h = values.double(), weight.double(), damped.double()
    size = q.shape[1] // grid.scale.shape[1]
    for j in range(q.shape[1]):
        scale, zero = (t[:, j // size].double() for t in (grid.scale, grid.stored_zero))
        free = q[:, j] - (q - w) @ h[:, j] / h[j, j]
        q[:, j] = ((free / scale + zero).round().clamp(*grid.limits) - zero) * scale
    return q


@pytest.mark.parametrize("text", SCHEMES)
def test_a_pass_of_descent_is_the_plain_loop(text: str):
    weight, grid, codes, damped = rounded(text, k=160)
    factor = damped / damped.diagonal(dim1=1, dim2=2).unsqueeze(1)
    got = grid.values(sweep(weight, grid.values(codes), grid, factor)).double()
    want = plain_descent(weight, grid.values(codes), grid, damped[0])
    assert int(((got - want).abs() < 1e-5).all(1).sum()) >= 22  # but for ties that fp32 breaks in another way


@pytest.mark.parametrize("text", ["int4@group:16", "int4@group:32:asym", "int3@channel", "int1@group:16"])
def test_refitted_scales_are_those_of_least_squares(text: str):
    weight, grid, codes, damped = rounded(text)
    grid = replace(grid, dtype=torch.float32)
    got = refit(weight, grid, codes, damped).scale
    root = torch.linalg.cholesky(damped[0].double())
    groups = grid.scale.shape[1]
    units = grid.values(codes).double().view(24, groups, -1) / grid.scale.double().unsqueeze(2)
    basis = torch.zeros(24, groups, 96, dtype=torch.float64)
    for g, part in enumerate(units.unbind(1)):
        basis[:, g, g * part.shape[1] : (g + 1) * part.shape[1]] = part
    want = torch.linalg.lstsq((basis @ root).mT, (weight.double() @ root).unsqueeze(2)).solution.squeeze(2)
    ratio = want / grid.scale.double()
    solved = ((ratio >= 1 / LARGEST_CHANGE) & (ratio <= LARGEST_CHANGE)).all(1)
    assert int(solved.sum()) >= 20
    torch.testing.assert_close(got[solved].double(), want[solved], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", SCHEMES)
def test_every_round_loses_less(text: str):
    weight, grid, codes, damped = rounded(text)
    losses = [loss(grid.values(codes) - weight, damped[0])]
    for _ in range(3):
        grid, codes = refine(weight, grid, codes, damped, 1)
        losses.append(loss(grid.values(codes) - weight, damped[0]))
    assert losses[3] < losses[2] < losses[1] < 0.998 * losses[0]


def test_scales_are_refitted_as_they_are_stored():
    weight, grid, codes, damped = rounded("int4@group:16")
    scale = refit(weight, grid, codes, damped).scale
    assert grid.dtype == torch.float16 and same_bits(scale, scale.half().float())


def test_no_scale_changes_its_sign_or_by_more_than_three_times():
    weight, grid, codes, damped = rounded("int4@group:16")
    for factor in (0.1, 10.0, -1.0):
        wrong = replace(grid, scale=grid.scale * factor)
        ratio = refit(weight, wrong, codes, damped).scale / wrong.scale
        assert bool(((ratio > 0.33) & (ratio < 3.01)).all())


def test_one_scale_for_all_stays_one():
    weight, grid, codes, damped = rounded("int4@tensor")
    refined, codes = refine(weight, grid, codes, damped, 2)
    assert len(refined.scale.unique()) == 1 and float(refined.scale[0]) != float(grid.scale[0])


def test_rows_in_pieces_are_refitted_as_in_one(monkeypatch: pytest.MonkeyPatch):
    weight, grid, codes, damped = rounded("int4@group:16")
    whole = refit(weight, grid, codes, damped).scale
    monkeypatch.setattr("gs_algos.ptq.refine.SYSTEM", 6 * 96 * 7)
    torch.testing.assert_close(refit(weight, grid, codes, damped).scale, whole, rtol=1e-3, atol=0)


def test_no_round_changes_nothing():
    weight, grid, codes, damped = rounded("int4@group:16")
    assert refine(weight, grid, codes, damped, 0) == (grid, codes)


@pytest.mark.parametrize("text", ["int4@group:16", "int2@channel", "int3@group:32:asym"])
def test_nearest_loses_more_than_gptq_and_that_more_than_gptq_refined(text: str):
    weight, sums = random(32, 64), statistics(inputs(1000, 64))
    settings = [("nearest", 0), ("gptq", 0), ("gptq", 2)]
    options = [SolveOptions(rounding=name, correct=0, refine=rounds) for name, rounds in settings]
    losses = [solve(weight, sums, scheme(text), o).objective for o in options]
    assert losses[0] > 1.5 * losses[1] > 1.5 * 1.03 * losses[2]
