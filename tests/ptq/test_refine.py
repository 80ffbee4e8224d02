"""Scales and codes improved together: against a plain loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.refine import LARGEST_CHANGE, refine
from gs_algos.ptq.rounding.gptq import gptq
from gs_algos.ptq.solve import SolveOptions, solve
from gs_algos.quant.packed.grid import Grid, grid_of
from tests.helpers import same_bits
from tests.ptq.test_solve import SCHEMES, inputs, prepared, random, scheme, statistics


def loss(error: Tensor, damped: Tensor) -> float:
    """tr(E H E^T) in float64; damped `[K, K]`."""
    return float(((error.double() @ damped.double()) * error.double()).sum())


def rounded(text: str, n: int = 24, k: int = 96) -> tuple[Tensor, Grid, Tensor, Hessian]:
    """(weight, grid, codes of gptq, Hessian)."""
    weight, hessian = random(n, k), prepared(statistics(inputs(400, k)))
    grid = grid_of(weight, scheme(text))
    return weight, grid, gptq(weight, grid, hessian), hessian


def plain_pass(weight: Tensor, grid: Grid, codes: Tensor, damped: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scales) after a pass in float64, e H anew for each step: scales of 128 columns, then codes."""
    w, h, scale, zero = (t.double().clone() for t in (weight, damped, grid.scale, grid.stored_zero))
    size = w.shape[1] // scale.shape[1]
    units = codes.double() - zero.repeat_interleave(size, 1)
    q = units * scale.repeat_interleave(size, 1)
    width = size * max(1, 128 // size)
    for first in range(0, w.shape[1], width):
        end = min(first + width, w.shape[1])
        for g in range(first // size, end // size):
            here = slice(g * size, g * size + size)
            slope = (((q - w) @ h)[:, here] * q[:, here]).sum(1)
            curvature = ((q[:, here] @ h[here, here]) * q[:, here]).sum(1)
            ratio = torch.where(curvature > 0, 1 - slope / curvature, 1)
            ratio = torch.where((ratio * LARGEST_CHANGE >= 1) & (ratio <= LARGEST_CHANGE), ratio, 1)
            moved = (scale[:, g] * ratio).to(grid.dtype).double()
            change = torch.where(scale[:, g] == 0, 0, moved / scale[:, g] - 1)
            change = torch.where(change * (2 * slope + change * curvature) < 0, change, 0)
            scale[:, g] *= 1 + change
            q[:, here] *= 1 + change[:, None]
        for j in range(first, end):
            s, z = scale[:, j // size], zero[:, j // size]
            free = q[:, j] - (q - w) @ h[:, j] / h[j, j]
            q[:, j] = ((torch.where(s == 0, 0, free / s) + z).round().clamp(*grid.limits) - z) * s
    return q, scale


@pytest.mark.parametrize("text", [text for text in SCHEMES if "tensor" not in text])
def test_a_pass_is_the_plain_loop(text: str):
    weight, grid, codes, hessian = rounded(text, k=160)
    refined, found, _ = refine(weight, grid, codes, hessian, 1)
    values, scale = plain_pass(weight, grid, codes, hessian.damped[0])
    same = ((refined.values(found) - values).abs() < 1e-4).all(1)
    assert int(same.sum()) >= 20  # a tie that fp32 breaks in another way changes the rest of its row
    torch.testing.assert_close(refined.scale[same].double(), scale[same], rtol=1e-3, atol=0)


@pytest.mark.parametrize("text", SCHEMES)
def test_every_round_loses_less(text: str):
    weight, grid, codes, hessian = rounded(text)
    losses = [loss(grid.values(codes) - weight, hessian.damped[0])]
    for _ in range(3):
        grid, codes, told = refine(weight, grid, codes, hessian, 1)
        losses.append(loss(grid.values(codes) - weight, hessian.damped[0]))
        assert told == pytest.approx(losses[-1], rel=1e-4)
    assert losses[3] < losses[2] < losses[1] < 0.998 * losses[0]


def test_scales_are_refitted_as_they_are_stored():
    weight, grid, codes, hessian = rounded("int4@group:16")
    scale = refine(weight, grid, codes, hessian, 1)[0].scale
    assert not same_bits(scale, grid.scale)
    assert grid.dtype == torch.float16 and same_bits(scale, scale.half().float())


def test_no_scale_changes_its_sign_or_by_more_than_three_times():
    weight, grid, codes, hessian = rounded("int4@group:16")
    for factor in (0.1, 10.0, -1.0):
        wrong = replace(grid, scale=grid.scale * factor)
        ratio = refine(weight, wrong, codes, hessian, 1)[0].scale / wrong.scale
        assert bool(((ratio > 0.33) & (ratio < 3.01)).all())


def test_one_scale_for_all_stays_as_it_is():
    weight, grid, codes, hessian = rounded("int4@tensor")
    refined, found, _ = refine(weight, grid, codes, hessian, 2)
    assert same_bits(refined.scale, grid.scale) and not same_bits(found, codes)


def test_groups_of_factors_are_refined_as_one_by_one():
    x = torch.stack([inputs(100, 32, seed=seed) for seed in range(3)])
    weight = random(12, 32)
    grid = grid_of(weight, scheme("int4@group:16"))
    whole, codes, _ = refine(weight, grid, grid.codes(weight), prepared(statistics(x, groups=3)), 2)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        alone = prepared(statistics(x[i]))
        part, found, _ = refine(weight[rows], grid.rows(rows), grid.codes(weight)[rows], alone, 2)
        torch.testing.assert_close(whole.rows(rows).values(codes[rows]), part.values(found), rtol=1e-3, atol=1e-3)


def test_no_round_changes_nothing():
    weight, grid, codes, hessian = rounded("int4@group:16")
    assert refine(weight, grid, codes, hessian, 0)[:2] == (grid, codes)


@pytest.mark.parametrize("text", ["int4@group:16", "int2@channel", "int3@group:32:asym"])
def test_nearest_loses_more_than_gptq_and_that_more_than_gptq_refined(text: str):
    weight, sums = random(32, 64), statistics(inputs(1000, 64))
    settings = [("nearest", 0), ("gptq", 0), ("gptq", 2)]
    options = [SolveOptions(rounding=name, correct=0, refine=rounds) for name, rounds in settings]
    losses = [solve(weight, sums, scheme(text), o).objective for o in options]
    assert losses[0] > 1.5 * losses[1] > 1.5 * 1.03 * losses[2]
