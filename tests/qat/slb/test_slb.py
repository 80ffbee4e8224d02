"""SLB from float network to packed codes: where the search starts, how it ends, and that nothing moves afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SLB
from gs_algos.cli.app import run
from gs_algos.fx.modularize.functional_calls import modularize
from gs_algos.qat.slb.config import SCHEDULES
from gs_algos.qat.slb.schedule import Schedule
from gs_algos.quant.level_grid import LevelGrid, fitted_scale
from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.conv_base import conv_rows, geometry_of
from gs_kernels import pack_weight, unpack_codes
from tests.nets.convolutional import SmallConvNet, images, train

MIXED = {
    "weight": "2bit@channel",
    "rules": [("stem", {"weight": "4bit@channel:learned"}), ("fc", {"weight": "1bit@tensor"})],
}


def prepared(steps: int = 10, model: type[nn.Module] = SmallConvNet, **options):
    torch.manual_seed(0)
    algo = SLB(total_steps=steps, **options)
    return algo.apply(model(), images()), algo


def codes_of(net: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: m for name, m in net.named_modules() if hasattr(m, "search")}
    return {name: unpack_codes(m.search.packed().codes, m.search.grid.bits, m.search.size) for name, m in found.items()}


@pytest.mark.parametrize("text", ["1bit", "2bit", "4bit"])
def test_levels_are_those_of_the_paper_and_the_fitted_scale_is_the_best(text):
    grid = LevelGrid.parse(text)
    torch.testing.assert_close(grid.levels(), torch.linspace(-1, 1, 2**grid.bits))
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))

    def error(c: torch.Tensor) -> torch.Tensor:
        nearest = (rows[..., None] - c[:, None, None] * grid.levels()).abs().amin(-1)
        return nearest.square().sum(1)

    best = fitted_scale(rows, grid)
    for factor in (0.6, 0.8, 0.9, 1.1, 1.25, 1.6):
        assert (error(best) <= error(best * factor)).all()
    assert fitted_scale(torch.zeros(1, 4), grid).tolist() == [1.0]


@pytest.mark.parametrize(
    "text, within", [("4bit@channel", 0.06), ("2bit@channel", 0.18), ("2bit@tensor", 0.2), ("1bit@channel", 0.45)]
)
def test_the_search_starts_at_the_weights_and_takes_the_nearest_codes(text, within):
    torch.manual_seed(0)
    net = SmallConvNet()
    weight = net.block.conv1.weight.detach().clone()
    SLB(weight=text, total_steps=4).apply(net, images())
    search = net.block.conv1.search
    assert (search(torch.float32) - weight).norm() < within * weight.norm()
    scale = search.scale.view(-1, *[1] * (weight.dim() - 1))
    nearest = (weight[..., None] / scale[..., None] - search.levels).abs().argmin(-1)
    assert torch.equal(codes_of(net)["block.conv1"].view_as(nearest).long(), nearest)


def test_without_a_scale_the_batch_norm_takes_over_the_size_of_the_weight():
    torch.manual_seed(0)
    net = SmallConvNet()
    net.train()
    for seed in range(30):
        net(images(32, seed))
    with_scale, without = copy.deepcopy(net).eval(), net.eval()
    rules = [("fc", None)]
    SLB(weight="2bit@tensor", rules=rules, total_steps=4).apply(with_scale, images())
    SLB(weight="2bit", rules=rules, total_steps=4).apply(without, images())
    assert without.stem.search.scale is None
    torch.testing.assert_close(without(images()), with_scale(images()), rtol=1e-3, atol=1e-3)


def test_random_logits_are_those_of_the_paper_and_need_no_weights():
    net, _ = prepared(weight="2bit", init="random", t0=4.0, rules=[("fc", None)])
    logits = net.block.conv2.search.logits * 4.0  # in units of the first temperature
    assert abs(logits.mean().item()) < 0.05 and abs(logits.std().item() - 1) < 0.05


def test_temperature_follows_golden_stick_and_reaches_t_final():
    golden = Schedule(300 * 5, 5, **SCHEDULES["golden-stick-cifar10"])
    assert [golden.temperature(5 * epoch) for epoch in (0, 60)] == [1.0, 1.0]
    assert golden.temperature(5 * 61 + 4) == pytest.approx(1 / 1.2)  # constant within an epoch
    assert golden.temperature(5 * 100) == pytest.approx(1 / 1.2**40)  # algorithms.md: 1,470
    assert golden.one_hot_step == 900 and golden.temperature(899) > 0 and golden.temperature(900) == 0
    steps = Schedule(1000, t0=2.0, t_start=0.1, t_end=0.9, t_final=200.0)
    assert steps.temperature(100) == pytest.approx(0.5)
    assert steps.temperature(500) == pytest.approx(1 / 20)  # the geometric middle
    assert steps.temperature(899) == pytest.approx(1 / 200, rel=0.01)


def test_mixed_bits_train_to_codes_that_convert_exactly_and_reload_exactly(tmp_path):
    net, algo = prepared(**MIXED)
    train(net, algo, steps=10)
    assert set(algo.gaps().values()) == {0.0}
    want, codes = net.eval()(images(seed=7)), codes_of(net)
    algo.convert(net)
    assert algo.parity.layer_error < 1e-6 and algo.parity.output_error < 1e-5
    torch.testing.assert_close(net(images(seed=7)), want, rtol=1e-4, atol=1e-5)
    for name, expected in codes.items():
        layer = net.get_submodule(name)
        got = unpack_codes(layer.packed.codes, layer.bits, layer.shape)
        if isinstance(layer, PackedConv):  # channels fastest
            got = got.view(len(got), -1, layer.filter[0]).transpose(1, 2).flatten(1)
        assert torch.equal(got, expected)
    assert {net.stem.bits, net.block.conv1.bits, net.fc.bits} == {4, 2, 1}
    assert algo.summary(net).count("float x packed codes") == len(codes)
    again = gs_algos.load(gs_algos.save(net, tmp_path), SmallConvNet).eval()
    assert torch.equal(again(images(seed=7)), net(images(seed=7)))


@pytest.mark.parametrize("bits, times", [(4, 8), (2, 16), (1, 32)])
def test_the_file_is_smaller_by_the_bits(bits, times, tmp_path):
    def build() -> nn.Module:
        conv, bn = nn.Conv2d(64, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        return nn.Sequential(conv, bn, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 512, bias=False))

    algo = SLB(weight=f"{bits}bit@channel", total_steps=1)
    net = algo.apply(build(), torch.randn(2, 64, 4, 4))
    weights = 4 * (48 * 64 * 9 + 512 * 48)
    algo.step()
    algo.convert(net)
    folder = gs_algos.save(net, tmp_path)
    file = next(folder.glob("*.safetensors"))
    scales_and_bias = 4 * (48 + 512) + 4 * 48
    assert file.stat().st_size - weights // times - scales_and_bias < 900  # the names and shapes of five tensors
    assert sum(t.numel() for key, t in net.state_dict().items() if key.endswith("codes")) == weights // times


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_nothing_moves_the_weights_once_the_codes_are_chosen(kind, set_to_none):
    net, algo = prepared(steps=8, t_end=0.5, **MIXED)
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.99, weight_decay=0.5)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.5, weight_decay=1.0)
    for seed in range(8):
        net.train()
        net(images(seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        algo.step()
        if seed == 3:
            chosen, gamma = codes_of(net), net.bn.weight.detach().clone()
            weight, mean = net.block.conv1.weight.clone(), net.bn.running_mean.clone()
            logits = net.block.conv1.search.logits.detach().clone()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert all(torch.equal(codes, chosen[name]) for name, codes in codes_of(net).items())
    assert torch.equal(net.block.conv1.weight, weight)
    assert not torch.equal(net.bn.weight, gamma) and not torch.equal(net.bn.running_mean, mean)
    assert torch.equal(net.block.conv1.search.logits, logits)


def test_weights_that_are_chosen_cost_no_gradient():
    net, algo = prepared(steps=2, t_end=0.5, weight="2bit@channel")
    algo.step()
    net.train()
    net(images()).sum().backward()
    assert net.block.conv1.search.logits.grad is None
    assert not net.block.conv1.mixed(images()).requires_grad


@pytest.mark.parametrize("stop", [3, 7])  # while the temperature falls, and among chosen codes
def test_a_resumed_search_continues_exactly(stop, tmp_path):
    options = {"steps": 10, "act": "uint4@tensor:ema", "batch_norm": "state", **MIXED}

    def steps_of(net, algo, optimizer, steps):
        for seed in steps:
            net.train()
            net(images(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()

    def optimizer_of(net):
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    whole, algo = prepared(**options)
    steps_of(whole, algo, optimizer_of(whole), range(10))
    part, algo = prepared(**options)
    optimizer = optimizer_of(part)
    steps_of(part, algo, optimizer, range(stop))
    resumed = gs_algos.load(gs_algos.save(part, tmp_path), SmallConvNet)
    algo = SLB.resume(resumed, total_steps=10)
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    steps_of(resumed, algo, again, range(stop, 10))
    state = resumed.state_dict()
    assert algo.steps == 10
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_state_batch_norm_keeps_the_statistics_of_the_quantized_weights():
    net, algo = prepared(weight="1bit@channel", batch_norm="state", rules=[("fc", None)])
    net.train()
    net.bn.momentum = 1.0
    x = images(seed=5)
    quantized = F.conv2d(x, net.stem.search(torch.float32, quantized=True), padding=1)
    mixture = F.conv2d(x, net.stem.search(torch.float32), padding=1)
    seen = {}
    net.bn.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    net(x)
    torch.testing.assert_close(net.bn.running_mean, quantized.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn.running_var, quantized.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen["x"], mixture)
    torch.testing.assert_close(seen["y"].mean((0, 2, 3)), net.bn.bias.detach(), rtol=0, atol=1e-5)
    train(net, algo, steps=10)
    algo.convert(net)
    assert type(net.bn) is nn.Identity


def test_calibrated_batch_norms_hold_the_mean_over_the_batches():
    net, algo = prepared(weight="1bit@channel")
    batches = [images(seed=1), images(seed=2)]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"SLB\.calibrate_norms: the inputs must run through the model"):
        algo.calibrate_norms(net, [images(), torch.randn(2, 5, 12, 12)])
    with pytest.raises(ValueError, match="at least one batch"):
        algo.calibrate_norms(net, [])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    algo.calibrate_norms(net, batches)
    outputs = [F.conv2d(x, net.stem.search(torch.float32, quantized=True), padding=1) for x in batches]
    torch.testing.assert_close(net.bn.running_mean, sum(y.mean((0, 2, 3)) for y in outputs) / 2)
    torch.testing.assert_close(net.bn.running_var, sum(y.var((0, 2, 3)) for y in outputs) / 2)
    assert net.bn.momentum == 0.1 and net.training and net.bn.training


def test_ends_are_the_layers_that_run_first_and_last_unless_a_rule_is_on_them():
    _, algo = prepared(weight="1bit@channel", ends="8bit@channel", rules=[("fc", {"weight": "4bit@channel"})])
    grids = {row.site: row.settings.weight for row in algo.plan(SmallConvNet(), images()).acted()}
    assert (grids["stem"], grids["fc"], grids["block.conv1"]) == ("8bit@channel", "4bit@channel", "1bit@channel")
    rows = SLB(weight="1bit@channel", ends=None).plan(SmallConvNet(), images()).kept()
    assert [row.site for row in rows if row.kind != "add"] == ["stem", "fc"]


def test_one_dimensional_convolutions_and_linears_are_searched():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", groups=2), nn.ReLU(), nn.Linear(9, 5)
        )

    x = torch.randn(3, 4, 9)
    algo = SLB(weight="2bit@channel", total_steps=2)
    net = algo.apply(build(), x)
    train(net, algo, steps=2, x=x)
    want = net.eval()(x)
    torch.testing.assert_close(algo.convert(net)(x), want)


def test_the_trace_and_the_picture_show_the_softmax_becoming_one_hot(tmp_path):
    pytest.importorskip("matplotlib")
    net, algo = prepared(steps=20, trace=5, weight="2bit@channel")
    train(net, algo, steps=20)
    trace = algo.traces()["block.conv1"]
    assert trace.shape == (5, 12) and not trace.isnan().any()
    assert trace[0, 0] > 0.05 and trace[-1, 0] == 0  # gap
    assert trace[0, 1] < 0.9 and trace[-1, 1] == 1  # confidence
    torch.testing.assert_close(trace[:, 2:].sum(1), torch.ones(5))
    algo.picture(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_plan_says_what_each_layer_becomes_and_touches_nothing():
    net = SmallConvNet()
    before = copy.deepcopy(net.state_dict())
    plan = SLB(**MIXED).plan(net, images())
    assert "search Conv2d + BatchNorm2d + relu" in str(plan) and "1 logit a weight" in str(plan)
    assert "make the optimizer after apply" in str(plan)
    assert type(net.stem) is nn.Conv2d and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_weight_that_another_module_owns_becomes_logits_of_the_layer_that_uses_it():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.fc(x), self.w)

    x = torch.randn(2, 8)
    for net in (Functional(), modularize(Functional(), x)):
        algo = SLB(weight="2bit@channel", total_steps=1)
        assert [row.site for row in algo.plan(net, x).acted()] == ["fc", "w_linear"]
        names = [name for name, _ in algo.apply(net, x).named_parameters()]
        assert names == ["fc.bias", "fc.search.logits", "w_linear.search.logits"]


def test_float_keys_stay_but_for_the_searched_weights():
    float_keys = set(SmallConvNet().state_dict())
    net, algo = prepared(weight="2bit@channel", rules=[("fc", {"fused": True})])
    keys = set(net.state_dict())
    searched = {"stem.weight", "block.conv1.weight", "block.conv2.weight", "block.project.0.weight"}
    assert float_keys - keys == searched  # a fused layer keeps its weight
    assert {key for key in keys if key.endswith("logits")} >= {
        key.replace("weight", "search.logits") for key in searched
    }
    assert len(algo.logits()) == 4 and len(algo.fused_layers()) == 1
    own = {id(p) for p in algo.parameters(net)}
    assert id(net.bn.weight) in own and id(net.stem.search.logits) not in own and id(net.fc.weight) not in own


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_packed_convolution_is_that_of_its_dequantized_weight(kind):
    generator = torch.Generator().manual_seed(2)
    axes = int(kind.__name__[4])
    conv = kind(4, 6, 3, stride=2, padding=1, dilation=1, groups=2, padding_mode="replicate")
    weight = torch.randint(0, 4, (6, 2 * 3**axes), generator=generator, dtype=torch.uint8)
    packed = pack_weight(weight, torch.rand(6, 1, generator=generator), 1.5, bits=2, group_size=weight.shape[1])
    filter = conv.weight.shape[1:]
    layer = PackedConv(conv_rows(packed, filter), geometry_of(conv), filter, conv.bias)
    conv.weight.data = ((weight - 1.5) * packed.scale).view_as(conv.weight)
    x = torch.randn(2, 4, *[7] * axes, generator=generator)
    torch.testing.assert_close(layer.weight, conv.weight.data)
    torch.testing.assert_close(layer(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"filter must have the .* elements of a row"):
        PackedConv(packed, geometry_of(conv), (5, 5))


def test_the_demo_searches_and_tells_what_it_did(tmp_path, capsys):
    options = ["--algorithm", "slb", "--model", "lenet5", "--float-epochs", "1", "--epochs", "1", "--device", "cpu"]
    assert run(["demo", *options, "--weight", "2bit@channel", "--out", str(tmp_path / "demo")]) == 0
    assert "slb: 5 of 5 sites" in capsys.readouterr().out
    assert run(["info", str(tmp_path / "demo" / "model")]) == 0
    assert "slb, converted after 22 steps: weight=2bit@channel" in capsys.readouterr().out
