"""Codes of one layer from the statistics of its input: GPTQ, its target and grid, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gs_algos.core.input_statistics import InputStatistics
from gs_algos.ptq.hessian import Hessian, hessian_of, objective
from gs_algos.ptq.rounding.gptq import gptq
from gs_algos.ptq.solve import Solution, SolveOptions, solve
from gs_algos.ptq.target import corrected, damping
from gs_algos.quant.packed.grid import Grid, grid_of
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import dequantize_packed
from tests.helpers import same_bits

SCHEMES = (
    "int4@group:16",
    "int4@group:16:asym",
    "int3@group:32:mse",
    "uint4@channel:asym",
    "int2@channel",
    "int8@tensor",
    "int1@group:16",
    "int1@group:16:asym",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Correlated, with columns of very different size, as the inputs of real layers are."""
    mixed = random(tokens, k, seed=seed) @ random(k, k, seed=1).mul(random(k, 1, seed=2).exp()) / math.sqrt(k)
    return mixed * random(k, seed=3).exp()


def statistics(x: Tensor, floats: Tensor | None = None, groups: int = 1) -> InputStatistics:
    sums = InputStatistics(x.shape[-1], groups, cross=floats is not None)
    sums.update(x, floats)
    return sums


def scheme(text: str) -> Scheme:
    return Scheme.parse(text, "weight")


def prepared(sums: InputStatistics, order: str = "act", size: int = 16) -> Hessian:
    return hessian_of(sums, damping(sums, None, sums.columns), order, size)


def plain_gptq(weight: Tensor, grid: Grid, damped: Tensor, order: list[int]) -> Tensor:
    """GPTQ as its paper writes it, column by column, with the Cholesky factor of the inverse, in float64."""
    n, k = weight.shape
    size = k // grid.scale.shape[1]
    w = weight.double()[:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()[order][:, order]), upper=True)
    low, high = grid.limits
    values = torch.zeros(n, k, dtype=torch.float64)
    for j in range(k):
        scale, zero = (t[:, order[j] // size].double() for t in (grid.scale, grid.stored_zero))
        step = torch.where(scale == 0, 0, w[:, j] / scale)
        values[:, order[j]] = ((step + zero).round().clamp(low, high) - zero) * scale
        error = (w[:, j] - values[:, order[j]]) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return values


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("order", ["act", "group", "none"])
def test_gptq_is_the_plain_column_loop(text: str, order: str):
    k = 160  # a block of 128 columns, and some
    weight, sums = random(24, k), statistics(inputs(400, k))
    grid = grid_of(weight, scheme(text))
    hessian = prepared(sums, order)
    want = plain_gptq(weight, grid, hessian.damped[0], hessian.order[0].tolist())
    got = grid.values(gptq(weight, grid, hessian)).double()
    same = ((got - want).abs() < 1e-5).all(1)
    assert int(same.sum()) >= 22  # a tie that fp32 breaks in another way changes the rest of its row
    losses = [objective((q - weight).float(), sums.gram) for q in (got, want)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_act_order_takes_the_largest_columns_first_and_group_order_keeps_groups_together():
    sums = statistics(torch.diag(torch.tensor([1.0, 4.0, 3.0, 6.0, 2.0, 5.0])))
    assert prepared(sums, "act").order.tolist() == [[3, 5, 1, 2, 4, 0]]
    assert prepared(sums, "group", 2).order.tolist() == [[3, 2, 5, 4, 1, 0]]
    assert prepared(sums, "none").order.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_factor_of_the_hessian_gives_it_back():
    hessian = prepared(statistics(inputs(100, 40)))
    factor, order = hessian.factor[0].double(), hessian.order[0]
    assert same_bits(factor.triu(), factor) and factor.diagonal().unique().tolist() == [1.0]
    back = factor @ torch.diag(hessian.pivots[0].double()) @ factor.T
    torch.testing.assert_close(back.float(), hessian.damped[0][order][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_losses_by_the_factor_are_those_of_the_second_moments(groups: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gs_algos.ptq.hessian.WIDE", 16)
    x = torch.stack([inputs(100, 40, seed=seed) for seed in range(groups)])
    x[:, :, 5] = 0
    sums, error = statistics(x if groups > 1 else x[0], groups=groups), random(4 * groups, 40)
    hessian = prepared(sums)
    for found, moments in ((hessian.loss(error), sums.gram), (hessian.damped_loss(error), hessian.damped)):
        wide = error.double().view(groups, -1, 40)
        assert found == pytest.approx(float(((wide @ moments.double()) * wide).sum()), rel=1e-4)


def test_damping_grows_as_tokens_get_few():
    sums = statistics(random(50, 40))
    assert damping(sums, None, 40) == 0.2
    assert damping(sums, 0.5, 40) == 0.5
    assert damping(statistics(random(5000, 40)), None, 40) == 0.01


@pytest.mark.parametrize("rows", [8, 60])
def test_the_corrected_target_solves_its_equation(rows: int):
    x = inputs(300, 40)
    floats = x + 0.1 * inputs(300, 40, seed=7)
    weight, sums = random(rows, 40), statistics(x, floats)
    hessian = prepared(sums)
    cross = (floats - x).double().T @ x.double()
    want = weight.double() + 0.5 * weight.double() @ cross @ torch.linalg.inv(hessian.damped[0].double())
    torch.testing.assert_close(corrected(weight, sums, 0.5, hessian).double(), want, rtol=1e-3, atol=1e-3)


def test_the_whole_correction_brings_the_output_nearer_to_the_float_one():
    x = inputs(300, 40)
    floats = x + 0.1 * inputs(300, 40, seed=7)
    weight, sums = random(24, 40), statistics(x, floats)
    options = [SolveOptions(correct=alpha, refine=0) for alpha in (0.0, 0.5, 1.0)]
    found = [dequantize_packed(solve(weight, sums, scheme("int4@group:8"), o).weight) for o in options]
    errors = [float((x @ q.T - floats @ weight.T).square().sum()) for q in found]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("text", SCHEMES)
def test_gptq_loses_less_than_nearest(text: str):
    weight, sums = random(32, 64), statistics(inputs(1000, 64))
    found = solve(weight, sums, scheme(text), SolveOptions(correct=0, refine=0))
    assert found.objective < 0.7 * found.nearest
    error = dequantize_packed(found.weight).double() - weight
    assert found.objective == pytest.approx(float((error @ sums.gram[0].double() * error).sum()), rel=1e-4)


def test_three_bits_are_stored_in_four():
    found = solve(random(8, 32), statistics(inputs(200, 32)), scheme("int3@channel"), SolveOptions(correct=0))
    assert (found.weight.bits, found.weight.zero) == (4, 8.0)
    codes = torch.stack((found.weight.codes & 15, found.weight.codes >> 4), 2)
    assert (int(codes.min()), int(codes.max())) == (4, 11)


def test_nearest_rounds_as_round_to_nearest_on_minmax_grids():
    weight, sums = random(16, 64), statistics(inputs(200, 64))
    found = solve(weight, sums, scheme("int8@group:16"), SolveOptions(rounding="nearest", correct=0, refine=0))
    want = round_to_nearest(weight, "int8@group:16")
    assert same_bits(found.weight.codes, want.codes) and same_bits(found.weight.scale, want.scale)


def test_nearest_searches_ranges_by_what_errors_cost():
    weight, sums = random(16, 64), statistics(inputs(500, 64))
    options = SolveOptions(rounding="nearest", correct=0, refine=0)
    found = solve(weight, sums, scheme("int3@group:32:mse"), options)
    plain = grid_of(weight, scheme("int3@group:32:mse"))
    diagonal = sums.gram[0].diagonal()
    by_columns = [
        float(((q - weight).square() * diagonal).sum())
        for q in (dequantize_packed(found.weight), plain.values(plain.codes(weight)))
    ]
    assert by_columns[0] < 0.9 * by_columns[1]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_columns_that_were_always_zero_are_rounded_to_nearest(rounding: str):
    x, w = inputs(200, 32), random(8, 32)
    x[:, [3, 17]] = 0
    options = SolveOptions(rounding=rounding, refine=0)
    found = solve(w, statistics(x, x + 0.01 * inputs(200, 32, seed=1)), scheme("int8@channel"), options)
    error = (dequantize_packed(found.weight) - w).abs()[:, [3, 17]]
    assert (error <= 0.501 * found.grid.scale.view(-1, 1)).all()
    refined = solve(w, statistics(x), scheme("int4@group:16"), SolveOptions(rounding=rounding, correct=0))
    nearest = refined.grid.values(refined.grid.codes(w))
    assert torch.equal(dequantize_packed(refined.weight)[:, [3, 17]], nearest[:, [3, 17]])
    assert refined.objective < refined.nearest


def test_weights_stay_where_the_input_was_always_zero():
    w = random(8, 32)
    found = solve(w, statistics(torch.zeros(9, 32)), scheme("int8@channel"), SolveOptions(correct=0))
    assert found.objective == 0 and (dequantize_packed(found.weight) - w).abs().max() <= w.abs().max() / 127


@pytest.mark.parametrize("cross", [True, False])
def test_a_layer_that_saw_no_token_is_rounded_to_nearest(cross: bool):
    weight = random(8, 32)
    found = solve(weight, InputStatistics(32, cross=cross), scheme("int4@group:16:mse"), SolveOptions())
    assert same_bits(found.weight.codes, round_to_nearest(weight, "int4@group:16:mse").codes)
    assert found.notes == ("saw no token: rounded to nearest",)


def test_grouped_weights_are_the_groups_one_by_one():
    x = torch.stack([inputs(100, 32, seed=seed) for seed in range(5)])
    weight = random(5, 4, 32)
    whole = solve(weight, statistics(x, groups=5), scheme("int4@group:16"), SolveOptions(correct=0))
    parts = [
        solve(w, statistics(g), scheme("int4@group:16"), SolveOptions(correct=0))
        for w, g in zip(weight, x, strict=True)
    ]
    together = torch.cat([dequantize_packed(part.weight) for part in parts])
    torch.testing.assert_close(dequantize_packed(whole.weight), together, rtol=1e-5, atol=1e-5)
    assert whole.objective == pytest.approx(sum(part.objective for part in parts), rel=1e-4)


def test_depthwise_filters_go_in_one_call():
    x = torch.stack([inputs(100, 9, seed=seed) for seed in range(40)])
    found = solve(random(40, 1, 9), statistics(x, groups=40), scheme("int4@channel"), SolveOptions(correct=0))
    assert found.weight.shape == (40, 9)
    assert found.objective < 0.8 * found.nearest


def test_a_weight_of_more_rows_than_go_together_is_its_parts(monkeypatch: pytest.MonkeyPatch):
    weight, sums = random(30, 64), statistics(inputs(300, 64))
    whole = solve(weight, sums, scheme("int4@group:16"), SolveOptions(correct=0)).weight
    monkeypatch.setattr("gs_algos.ptq.sweep.ROWS", 7)
    parts = solve(weight, sums, scheme("int4@group:16"), SolveOptions(correct=0)).weight
    torch.testing.assert_close(dequantize_packed(whole), dequantize_packed(parts), rtol=1e-5, atol=1e-5)


def test_solving_twice_gives_the_same_bits():
    x = inputs(300, 96)
    runs: list[Solution] = []
    for _ in range(2):
        sums = statistics(x, x + 0.1 * inputs(300, 96, seed=7))
        runs.append(solve(random(40, 96), sums, scheme("int4@group:32"), SolveOptions()))
    assert same_bits(runs[0].weight.codes, runs[1].weight.codes)
    assert same_bits(runs[0].weight.scale, runs[1].weight.scale)
    assert runs[0].objective == runs[1].objective


def test_the_damped_loss_is_computed_once_before_and_once_after_the_refinement(monkeypatch):
    computed, calls = Hessian.damped_loss, []
    monkeypatch.setattr(Hessian, "damped_loss", lambda *args: calls.append(args) or computed(*args))
    weight, sums = random(12, 32), statistics(inputs(200, 32))
    found = solve(weight, sums, scheme("int4@group:16:mse"), SolveOptions(correct=0))
    assert len(calls) == 3  # and once of the weight rounded to nearest
    error = found.grid.values(found.codes) - found.target
    assert found.objective == pytest.approx(objective(error, sums.gram), rel=1e-3)


def test_threads_change_the_objective_by_rounding_alone():
    x, before = inputs(300, 96), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(solve(random(40, 96), statistics(x), scheme("int4@group:32"), SolveOptions(correct=0)))
    finally:
        torch.set_num_threads(before)
    assert found[0].objective == pytest.approx(found[1].objective, rel=0.01)


def test_damping_grows_until_there_is_a_factor():
    sums = statistics(torch.eye(4))
    sums.gram[0, 0, 1] = sums.gram[0, 1, 0] = 1.05  # not a sum of squares
    found = solve(random(3, 4), sums, scheme("int4@channel"), SolveOptions(correct=0, damp=0.01))
    assert found.notes == ("damping 0.01 was too little for a factor: 0.1",)


def test_without_any_factor_weights_are_rounded_to_nearest():
    sums = statistics(torch.eye(4), 1.1 * torch.eye(4))
    sums.gram[0, 0, 1] = sums.gram[0, 1, 0] = 9.0
    weight = random(3, 4)
    found = solve(weight, sums, scheme("int8@channel"), SolveOptions())
    assert found.notes[-1] == "no factor with damping 1: rounded to nearest"
    assert same_bits(found.weight.codes, round_to_nearest(weight, "int8@channel").codes)


@pytest.mark.parametrize(
    ("weight", "text", "words"),
    [
        (torch.ones(4, 31), "int4@channel", r"up: weight must be \[N, 32\], as its statistics are, got \[4, 31\]"),
        (torch.ones(4, 32), "int4@group:24", "up: the group must divide the 32 inputs, got int4@group:24"),
        (torch.full((4, 32), torch.nan), "int4@channel", "up: weights must be finite, got NaN or Inf"),
    ],
)
def test_what_cannot_be_solved_is_refused(weight: Tensor, text: str, words: str):
    sums = statistics(inputs(100, 32))
    with pytest.raises(ValueError, match=words):
        solve(weight, sums, scheme(text), SolveOptions(), "up")


def test_inputs_that_are_not_finite_are_refused_with_the_name_of_the_layer():
    x = inputs(100, 32)
    x[5, 7] = torch.inf
    with pytest.raises(ValueError, match=r"blocks.3.up: .* must be finite, got .* in 1 of 32 columns"):
        solve(random(4, 32), statistics(x), scheme("int4@channel"), SolveOptions(correct=0), "blocks.3.up")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "up"}, "rounding must be one of nearest, gptq, got 'up'"),
        ({"order": "desc"}, "order must be one of act, group, none, got 'desc'"),
        ({"correct": 1.5}, r"correct must be in \[0, 1\], got 1.5"),
        ({"refine": -1}, "refine must be a whole number of rounds, >= 0, got -1"),
        ({"damp": 0.0}, "damp must be above 0 and at most 1, or None, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        SolveOptions(**options)
