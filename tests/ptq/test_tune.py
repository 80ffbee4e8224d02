"""Codes that are tuned by gradient, on what a block returns: signround and adaround."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gs_algos.ptq.ptq import PTQ
from gs_algos.ptq.rounding import TUNED
from gs_algos.ptq.rounding.tuned import fraction_of
from gs_algos.quant.packed.grid import Grid, grid_of
from gs_algos.quant.scheme import Scheme
from tests.helpers import relative_rms
from tests.ptq.test_ptq import Net, net
from tests.ptq.test_static import calibrated as static_calibrated
from tests.ptq.test_static import output, smooth

SCHEMES = ("int4@group:16", "int2@channel", "uint4@group:16:asym", "int1@group:16", "int8@tensor")
OPTIONS = {"signround": {"steps": 40}, "adaround": {"steps": 100}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int = 8, seed: int = 1) -> list[Tensor]:
    """Sequences whose rows and columns depend on each other, as those of real networks do."""
    mix = random(8, 8, seed=5)
    return [random(8, 12, 8, seed=seed + i).cumsum(1) @ mix / 3 for i in range(count)]


def calibrated(model: nn.Module, data: list[Tensor], rounding: str, **options) -> tuple[PTQ, nn.Module]:
    algo = PTQ(**{"weight": "int4@group:8", "rounding": rounding, **OPTIONS.get(rounding, {}), **options})
    model = algo.apply(model, data[0])
    algo.calibrate(model, data)
    return algo, model


def rounded(scheme: str) -> tuple[Tensor, Grid, Tensor]:
    """Returns a target, its grid and codes of which some are not the nearest."""
    weight = random(12, 32)
    grid = grid_of(weight, Scheme.parse(scheme, "weight"))
    return weight, grid, grid.codes(weight + 0.3 * random(12, 32, seed=1) * grid.scale.mean())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounding", list(TUNED))
def test_the_start_is_the_codes_and_scales_of_before(rounding, scheme):
    weight, grid, codes = rounded(scheme)
    fraction = fraction_of(weight, grid, codes, None)
    found_grid, found = TUNED[rounding](grid, codes, fraction, 10, None).rounded()
    assert found.dtype == codes.dtype and torch.equal(found, codes)
    assert torch.equal(found_grid.scale, grid.scale) and torch.equal(found_grid.zero, grid.zero)


@pytest.mark.parametrize("rounding", list(TUNED))
def test_a_weight_that_is_0_in_its_grid_and_has_no_gradient_stays_0(rounding):
    weight, grid, _ = rounded("int4@group:16")
    weight[:, 3] = 0
    codes = grid.codes(weight)
    tuned = TUNED[rounding](grid, codes, fraction_of(weight, grid, codes, None), 20, 0.1)
    for step in range(20):
        gradient = random(12, 32, seed=step)
        gradient[:, 3] = 0
        tuned.step(gradient)
    grid, found = tuned.rounded()
    assert not torch.equal(found, codes) and bool((grid.values(found)[:, 3] == 0).all())


@pytest.mark.parametrize("scheme", ["int4@channel", "uint4@channel:asym"])
def test_signround_finds_the_codes_that_a_linear_layer_wants(scheme):
    x = random(256, 32, seed=2).cumsum(1) / 3
    weight, grid, codes = rounded(scheme)
    tuned = TUNED["signround"](grid, codes, fraction_of(weight, grid, codes, None), 100, None)
    for seed in range(8):
        v = random(256, 12, seed=seed).sign()
        tuned.observe(v.t() @ x / v.numel() ** 0.5)
    error = lambda: float(((tuned.values() - weight) @ x.t()).square().mean())  # noqa: E731
    before = error()
    for _ in range(100):
        tuned.step(2 * (tuned.values() - weight) @ x.t() @ x / (12 * 256))
    assert error() < 0.5 * before


@pytest.mark.parametrize("rounding", list(TUNED))
def test_the_output_on_data_not_seen_moves_less_than_that_of_gptq(rounding):
    x = torch.cat(correlated(4, seed=90))
    with torch.no_grad():
        want = net()(x)
        outputs = [calibrated(net(), correlated(), name)[1](x) for name in ("gptq", rounding)]
    assert relative_rms(outputs[1], want) < 0.97 * relative_rms(outputs[0], want)


@pytest.mark.parametrize("rounding", list(TUNED))
def test_the_packed_network_gives_the_output_of_the_calibrated_one_and_a_second_run_its_bits(rounding):
    data = correlated(3)
    x = data[0]
    algo, model = calibrated(net(), data, rounding, act="int8@token")
    again = calibrated(net(), data, rounding, act="int8@token")[1].state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(algo.convert(model)(x), want, rtol=1e-4, atol=1e-4)


def test_no_block_is_worse_on_the_held_out_batch_than_before_it_was_tuned():
    algo, _ = calibrated(net(), correlated(), "signround")
    assert algo.report is not None
    tuned = {layer.site: layer.tuned for layer in algo.report.layers}
    assert max(ratio for ratio in tuned.values() if ratio is not None) <= 1
    assert tuned["head"] is None and tuned["blocks.0.up"] == tuned["blocks.0.down"] < 1
    assert "tuned: block error x 0." in str(algo.report)


def test_where_no_step_helps_the_codes_of_gptq_stay(monkeypatch):
    monkeypatch.setattr(TUNED["signround"], "step", lambda tuned, gradient: tuned.offset.fill_(0.5))
    data = correlated(3)
    model = calibrated(net(), data, "signround")[1]
    for key, value in calibrated(net(), data, "gptq")[1].state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_a_journal_goes_on_behind_a_tuned_block_with_the_same_bits(tmp_path, monkeypatch):
    data = correlated(4)
    want = calibrated(net(), data, "signround")[1].state_dict()
    from gs_algos.ptq import block_loop

    tune, calls = block_loop.BlockTuner.run, []

    def interrupted(tuner):
        calls.append(tuner.block.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tune(tuner)

    monkeypatch.setattr(block_loop.BlockTuner, "run", interrupted)
    for _ in range(2):
        algo = PTQ(weight="int4@group:8", rounding="signround", **OPTIONS["signround"])
        model = algo.apply(net(), data[0])
        try:
            algo.calibrate(model, data, journal=tmp_path)
        except KeyboardInterrupt:
            assert len(calls) == 2
    assert calls == ["blocks.0", "blocks.1", "blocks.1", "blocks.2"]
    assert algo.report is not None and algo.report.layers[1].tuned is not None
    for key, value in want.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_a_rule_tunes_one_layer_and_leaves_the_codes_of_the_others():
    data = correlated(4)
    plain = calibrated(net(1), data, "gptq", blocks="none")[1].state_dict()
    rules = [("blocks.0.down", {"rounding": "signround"})]
    model = calibrated(net(1), data, "gptq", blocks="none", rules=rules, **OPTIONS["signround"])[1]
    same = {key: torch.equal(value, plain[key]) for key, value in model.state_dict().items() if key.endswith("weight")}
    assert [key for key, equal in same.items() if not equal] == ["blocks.0.down.weight"]


def test_the_plan_names_the_layers_outside_the_blocks_that_are_not_tuned():
    rules = [("stem", {"rounding": "nearest"})]
    note = "rounded by gptq and not tuned, since outside the blocks: head"
    assert note in PTQ(weight="int4@group:8", rounding="signround", rules=rules).plan(net(), correlated(1)[0]).notes
    assert not any("not tuned" in text for text in PTQ(weight="int4@group:8").plan(net(), correlated(1)[0]).notes)


def test_the_plan_names_calls_of_functions_outside_the_blocks_that_are_not_tuned():
    class Functional(Net):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(random(5, 4))

        def forward(self, x):
            return nn.functional.linear(super().forward(x), self.matrix)

    algo = PTQ(weight="int4@channel", act="int8@tensor", rounding="adaround")
    told = [text for text in algo.plan(Functional().eval(), correlated(1)[0]).notes if "not tuned" in text]
    assert told == ["rounded by gptq and not tuned, since outside the blocks: head, matrix_linear"]


def test_padding_is_not_in_the_loss():
    class Padded(Net):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    data = correlated(4)
    mask = torch.ones(8, 12)
    mask[:, :4] = 0
    found = []
    for fill in (0.0, 100.0):
        padded = [torch.where(mask.bool().unsqueeze(2), x, fill) for x in data]
        torch.manual_seed(0)
        model = Padded().eval()
        inputs = [{"x": x, "attention_mask": mask} for x in padded]
        found.append(calibrated(model, inputs, "signround", blocks="none", bias=False)[1].state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_names_the_block_and_writes_nothing(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x))) * (torch.inf if torch.is_grad_enabled() else 1.0)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block()).eval()
    algo = PTQ(weight="int4@group:8", rounding="signround")
    model = algo.apply(model, correlated(1)[0])
    with pytest.raises(ValueError, match=r"PTQ\.calibrate: the error of what 0 returns must be finite, got"):
        algo.calibrate(model, correlated(3), journal=tmp_path)
    assert not list(tmp_path.glob("block-*"))


@pytest.mark.parametrize("rounding", list(TUNED))
def test_convolutions_with_static_activations_come_closer_and_convert_to_the_same_bits(rounding):
    options = {"weight": "int3@channel", "blocks": "none"}
    algo, model = static_calibrated(rounding=rounding, **options, **OPTIONS[rounding])
    assert algo.report is not None and all(layer.tuned is not None and layer.tuned < 1 for layer in algo.report.layers)
    x = smooth(seed=99)
    got = output(model, x)
    assert torch.equal(output(algo.convert(model), x), got)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps must be a whole number above 0, or None, got 0"),
        ({"lr": 0}, "lr must be above 0, or None, got 0"),
        ({"steps": 9}, "steps is for signround or adaround, got steps=9 and rounding='gptq'"),
        ({"lr": 0.1, "rounding": "nearest"}, "lr is for signround or adaround, got lr=0.1 and rounding='nearest'"),
        ({"rounding": "sign"}, "rounding must be one of nearest, gptq, signround, adaround, got 'sign'"),
    ],
)
def test_wrong_options_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        PTQ(**options)


def test_steps_are_taken_where_only_a_rule_is_tuned():
    assert PTQ(steps=9, rules=[("fc", {"rounding": "adaround"})]).config.steps == 9
