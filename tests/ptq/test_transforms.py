"""Transforms: the float network stays what it is, rounding costs less, and what cannot be scaled is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.ptq.block_loop import BlockLoop
from gs_algos.ptq.layers import Rounded, floating
from gs_algos.ptq.ptq import PTQ
from gs_algos.ptq.transforms.awq import awq, awq_scale
from gs_algos.ptq.transforms.columns import StageColumns
from gs_algos.ptq.transforms.smooth import smooth, smooth_scale, threshold_scale
from tests.nets.language_models import IDS, tiny_llama

WIDTH, OUTLIERS = 16, (3, 11)


class Norm(nn.Module):
    """RMS norm whose gain is 1 + weight, as that of Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    def __init__(self, norm=nn.LayerNorm, act=torch.sigmoid, again: bool = False) -> None:
        super().__init__()
        self.norm, self.act, self.again = norm(WIDTH), act, again
        self.gate, self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        y = self.down(self.act(self.gate(h)) * self.up(h))
        return x + y + h if self.again else x + y


class Plain(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.act, self.fc1, self.fc2 = act, nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


@torch.no_grad()
def net(block=Block, norm=nn.LayerNorm, **options) -> nn.Sequential:
    """Three blocks; the norms, and the linears beside the gates, return two channels far larger than the others."""
    torch.manual_seed(0)
    options |= {"norm": norm} if block is Block else {}
    model = nn.Sequential(*(block(**options) for _ in range(3))).eval()
    for part in model if block is Block else ():
        part.norm.weight[list(OUTLIERS)] = 30.0
        if norm is nn.LayerNorm:
            part.norm.bias.copy_(torch.randn(WIDTH))
        part.up.weight[[5, 20]] *= 30
        part.down.weight[:, [5, 20]] /= 30
        for layer in (part.gate, part.up):
            layer.weight[:, list(OUTLIERS)] /= 10
    return model


def batches(count: int = 5, rows: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    return [torch.randn(rows, WIDTH, generator=generator) @ mix for _ in range(count)]


def calibrated(model: nn.Module, data, **options) -> tuple[PTQ, nn.Module]:
    algo = PTQ(**{"weight": "int4@group:8", **options})
    model = algo.apply(model, data[0])
    algo.calibrate(model, data)
    return algo, model


def told(algo: PTQ) -> dict[str, tuple[str, ...]]:
    assert algo.report is not None
    return {layer.site: layer.transforms for layer in algo.report.layers}


@torch.no_grad()
def error(model: nn.Module, want: torch.Tensor, x: torch.Tensor) -> float:
    return float((model(x) - want).square().mean().sqrt() / want.square().mean().sqrt())


@torch.no_grad()
def float_error(monkeypatch, model: nn.Module, want, data, **options) -> float:
    """How far the float network is from itself behind all transforms: nothing is rounded."""
    monkeypatch.setattr(BlockLoop, "_solve", lambda *args: {})
    _, model = calibrated(model, data, **options)
    layers = [layer for layer in model.modules() if isinstance(layer, Rounded)]
    with floating(layers):
        got = model(**data[0]) if isinstance(data[0], dict) else model(data[0])
    got = getattr(got, "logits", got)
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("norm", [nn.LayerNorm, Norm])
@pytest.mark.parametrize(
    ("rules", "changed"),
    [((), ("0.norm.weight", "2.norm.bias")), ([("re:.*up", None)], ("0.up.weight", "1.up.bias", "2.down.weight"))],
)
def test_the_float_network_stays_what_it_is(monkeypatch, norm, rules, changed):
    data, model = batches(2), net(norm=norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        want = net(norm=norm)(data[0])
    options = {"rules": rules, "transforms": ("smooth=0.7", "awq")}
    assert float_error(monkeypatch, model, want, data, **options) <= 1e-5
    for key in changed:
        assert key not in before or not torch.equal(model.state_dict()[key], before[key]), key


@pytest.mark.parametrize(
    ("norm", "changed"), [(nn.LayerNorm, ("0.norm.weight", "0.norm.bias", "0.up.bias")), (Norm, ("0.norm.weight",))]
)
@pytest.mark.parametrize("transforms", [("relayernorm",), ("smooth=0.7", "relayernorm")])
def test_ranges_behind_a_norm_are_made_equal_and_the_float_network_stays(monkeypatch, norm, changed, transforms):
    data, model = batches(2), net(norm=norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        want = net(norm=norm)(data[0])
    assert float_error(monkeypatch, model, want, data, transforms=transforms) <= 1e-5
    for key in changed:
        assert not torch.equal(model.state_dict()[key], before[key]), key


@torch.no_grad()
def test_channels_behind_a_norm_have_one_range_around_0():
    data, model = batches(3), net()
    algo, model = calibrated(model, data, transforms=("relayernorm",), rounding="nearest", refine=0)
    h = torch.cat([model[0].norm(x) for x in data[:2]])
    low, high = h.amin(0), h.amax(0)
    torch.testing.assert_close(low, low.mean().expand_as(low), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(high, -low, rtol=1e-4, atol=1e-5)
    assert told(algo)["0.up"] == ("relayernorm by ranges, 0.norm",)
    assert told(algo)["0.down"] == ("relayernorm: no norm makes it",)


@pytest.mark.parametrize("bias", [True, False])
def test_ranges_made_equal_are_kept_by_the_journal_and_the_converted_network(tmp_path, bias):
    data, options = batches(3), {"transforms": ("relayernorm",), "bias": bias}
    algo = PTQ(weight="int4@group:8", **options)
    first = algo.apply(net(), data[0])
    algo.calibrate(first, data, journal=tmp_path / "journal")
    again = PTQ(weight="int4@group:8", **options)
    second = again.apply(net(), data[0])
    again.calibrate(second, data, journal=tmp_path / "journal")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    want = first(data[0])
    torch.testing.assert_close(algo.convert(first)(data[0]), want, rtol=1e-4, atol=1e-4)
    assert error(second, net()(data[0]), data[0]) < 0.1


@pytest.mark.parametrize("heads", [2, 4])
def test_a_float_llama_stays_what_it_is(monkeypatch, heads):
    pytest.importorskip("transformers")
    options = {"tied": False, "num_key_value_heads": heads}
    data = [{"input_ids": (IDS + i) % 32} for i in range(3)]
    with torch.no_grad():
        want = tiny_llama(**options)(**data[0]).logits
    for rules in ((), [("re:.*(v_proj|up_proj)", None)]):
        chosen = {"rules": rules, "transforms": ("smooth=0.6",)}
        assert float_error(monkeypatch, tiny_llama(**options), want, data, **chosen) <= 1e-5


def test_of_a_llama_norms_value_projections_and_what_is_beside_a_gate_take_the_scale_back():
    pytest.importorskip("transformers")
    data = [{"input_ids": (IDS + i) % 32} for i in range(3)]
    found = []
    for heads in (4, 2):
        model = tiny_llama(tied=False, num_key_value_heads=heads)
        algo, _ = calibrated(model, data, rounding="nearest", refine=0, transforms=("smooth=0.6",))
        at = {site.removeprefix("model.layers.1."): text for site, text in told(algo).items() if ".1." in site}
        found.append(at)
        for name, by in {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}.items():
            assert at[name] == (f"smooth 0.6, model.layers.1.{by}",)
        assert at["mlp.down_proj"] == ("smooth 0.6, model.layers.1.mlp.up_proj",)
    assert found[0]["self_attn.o_proj"] == ("smooth 0.6, model.layers.1.self_attn.v_proj",)
    assert "not scaled: neither a norm nor a linear" in found[1]["self_attn.o_proj"][0]


@pytest.mark.parametrize(
    ("act", "transforms"), [(None, (("awq",), ("smooth",), ("smooth", "awq"))), ("int8@token", (("smooth",),))]
)
def test_outliers_cost_less_behind_a_transform(act, transforms):
    data = batches(3)
    with torch.no_grad():
        want = net()(data[0])
    plain = {"act": act, "rounding": "nearest", "refine": 0, "correct": 0.0}
    first, *errors = (
        error(calibrated(net(), data, **plain, transforms=names)[1], want, data[0]) for names in ((), *transforms)
    )
    assert max(errors) < 0.3 * first
    assert errors[-1] < 1.1 * min(errors)


def test_outliers_cost_less_of_rows_of_8_bits():
    data = batches()
    with torch.no_grad():
        want = net()(data[0])
    options = {"weight": "int8@channel", "act": "int8@token"}
    errors = [
        error(calibrated(net(), data, **options, transforms=names)[1], want, data[0]) for names in ((), ("smooth=0.7",))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_outliers_cost_less_below_gptq_too():
    data = batches()
    with torch.no_grad():
        want = net()(data[0])
    errors = [error(calibrated(net(), data, transforms=names)[1], want, data[0]) for names in ((), ("awq",))]
    assert errors[1] < 0.8 * errors[0]


def test_the_packed_saved_and_loaded_network_has_the_new_norms(tmp_path):
    data, model = batches(), net()
    algo, model = calibrated(model, data, transforms=("smooth=0.7",))
    with torch.no_grad():
        want = model(data[0])
    model = algo.convert(model)
    gs_algos.save(model, tmp_path / "packed")
    loaded = gs_algos.load(tmp_path / "packed", net)
    with torch.no_grad():
        torch.testing.assert_close(loaded(data[0]), want, rtol=1e-5, atol=1e-5)
    assert not torch.equal(loaded[0].norm.weight, net()[0].norm.weight)


@pytest.mark.parametrize(("stopped", "act"), [(3, None), (8, None), (8, "int8@tensor")])
def test_a_journal_goes_on_with_the_same_bits(tmp_path, monkeypatch, stopped, act):
    from gs_algos.ptq import block_loop

    data, options = batches(3), {"weight": "int4@channel", "act": act, "transforms": ("smooth=0.7",)}
    want, solve, calls = calibrated(net(), data, **options), block_loop.solve, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(block_loop, "solve", interrupted)
    algo = PTQ(**options)
    model = algo.apply(net(), data[0])
    with pytest.raises(KeyboardInterrupt):
        algo.calibrate(model, data, journal=tmp_path)
    algo = PTQ(**options)
    model = algo.apply(net(), data[0])
    algo.calibrate(model, data, journal=tmp_path)
    for key, value in want[1].state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)
    assert told(algo) == told(want[0])


class Router(nn.Module):
    """Reads the norm's output as the experts do, which see some of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.shared, self.expert = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        first = self.router(h).argmax(-1) == 0
        y = self.shared(h)
        y[first] = y[first] + self.expert(h[first])
        return x + y


@pytest.mark.parametrize(
    ("block", "options", "site", "why"),
    [
        (Block, {"again": True}, "1.gate", "more than these layers reads what 1.norm returns"),
        (Plain, {"act": torch.nn.functional.gelu}, "1.fc2", "neither a norm nor a linear"),
        (Plain, {"act": torch.nn.functional.silu}, "1.fc2", "neither a norm nor a linear"),
        (Plain, {"act": torch.nn.functional.relu6}, "1.fc2", "neither a norm nor a linear"),
        (Plain, {"act": torch.relu}, "1.fc1", "neither a norm nor a linear"),
        (Router, {}, "1.shared", "more than these layers reads what 1.norm returns"),
        (Router, {}, "1.expert", "neither a norm nor a linear"),
    ],
)
def test_what_cannot_be_scaled_is_left_and_said(block, options, site, why, caplog):
    data = batches(2, 32)
    options = {"rounding": "nearest", "refine": 0} | {"model": net(block, **options)}
    model = options.pop("model")
    state = {key: value.clone() for key, value in model.state_dict().items() if "norm" in key}
    algo, model = calibrated(model, data, transforms=("smooth=0.5",), **options)
    assert why in told(algo)[site][0]
    scaled = [text for texts in told(algo).values() for text in texts if not text.startswith("not scaled")]
    assert ("smooth scaled nothing" in caplog.text) == (not scaled)
    for key, value in state.items():
        if site.startswith("1.") and key.startswith("1."):
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_a_linear_in_front_of_relu_takes_the_scale_back():
    algo, _ = calibrated(net(Plain, act=torch.relu), batches(2, 32), rounding="nearest", transforms=("smooth=0.5",))
    assert told(algo)["1.fc2"] == ("smooth 0.5, 1.fc1",)


def test_a_router_that_stays_float_keeps_the_norm_as_it_is():
    rules = [("re:.*router", None)]
    algo, _ = calibrated(net(Router), batches(2, 32), rounding="nearest", transforms=("smooth=0.5",), rules=rules)
    assert told(algo)["1.shared"] == ("not scaled: 1.router reads it, too",)


def test_layers_with_static_activations_are_scaled_too():
    data = batches(3)
    options = {"weight": "int8@channel", "act": "int8@tensor", "transforms": ("smooth=0.6",)}
    algo, model = calibrated(net(), data, **options)
    assert told(algo)["1.gate"] == ("smooth 0.6, 1.norm",)
    assert told(algo)["1.down"] == ("smooth 0.6, 1.up",)
    with torch.no_grad():
        want = net()(data[0])
        plain = calibrated(net(), data, weight="int8@channel", act="int8@tensor")[1](data[0])
        before = model(data[0])
        assert (before - want).norm() < 0.7 * (plain - want).norm()
        torch.testing.assert_close(algo.convert(model)(data[0]), before, rtol=1e-4, atol=1e-4)


def test_rows_of_layers_that_are_called_by_keyword_are_rounded_in_the_comparison():
    class Keyword(Block):
        def forward(self, x):
            return x + self.down(input=self.act(self.gate(input=self.norm(x))))

    algo, _ = calibrated(net(Keyword), batches(2, 32), act="int8@token", rounding="nearest", transforms=("smooth",))
    assert told(algo)["1.gate"][0].startswith("smooth ")


def test_scales_are_those_of_the_papers():
    x, w = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 4.0])
    torch.testing.assert_close(smooth_scale(x, w, 0.5), torch.tensor([2.0, 1.0, 1.5]))
    torch.testing.assert_close(threshold_scale(x, 3.0), torch.tensor([4 / 3, 1.0, 3.0]))
    torch.testing.assert_close(awq_scale(x, 0.5), torch.tensor([2.0, 6**0.5, 3.0]) / 6**0.5)
    share = torch.tensor([0.25, 1.0, 0.36])
    raw = torch.tensor([2 / 0.5001, 3 / 0.6001])
    torch.testing.assert_close(awq_scale(x, 0.5, share)[[0, 2]], raw / raw.prod().sqrt())


def test_groups_and_inputs_of_zeros_give_finite_scales():
    weight = torch.zeros(2, 8)
    weight[0, 4:] = 1.0
    for absmax in (torch.zeros(8), torch.tensor([0.0, 1.0] * 4)):
        columns = StageColumns(absmax, absmax / 2, -absmax, absmax, False, (weight,), (4,))
        for scale in (*smooth(columns, None).values(), *awq(columns, None).values()):
            assert bool((scale.isfinite() & (scale > 0)).all())


@pytest.mark.parametrize(
    ("transforms", "told"),
    [
        (("smoth",), "did you mean smooth"),
        (("smooth=2",), "smooth=<0 to 1>"),
        (("smooth=x",), "smooth=<0 to 1>"),
        (("awq=0.5",), "awq takes no number"),
        (("smooth", "smooth=0.5"), "named once"),
        ("smooth", "a tuple of texts"),
    ],
)
def test_wrong_transforms_are_refused(transforms, told):
    with pytest.raises((ValueError, TypeError), match=told):
        PTQ(transforms=transforms)
