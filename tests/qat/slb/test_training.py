"""A search inside everything that people train with: compile, autocast, checkpointing, fused optimizers; bad input."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gs_algos
from gs_algos import SLB
from gs_algos.qat.slb.optim import SlbAdamW, SlbSGD
from gs_algos.qat.slb.pact import PactQuantizer
from gs_algos.quant.integer.layers import INTEGER, WITHOUT_VNNI
from gs_algos.quant.scheme import Scheme
from tests.nets.convolutional import SmallConvNet, images, mlp, train
from tests.qat.simqat.test_training import Syncs


def prepared(steps: int = 10, **options):
    torch.manual_seed(0)
    algo = SLB(**{"weight": "2bit@channel", "total_steps": steps, **options})
    return algo.apply(SmallConvNet(), images()), algo


@pytest.mark.parametrize("act", [None, "int8@tensor:ema"])
def test_what_is_chosen_trains_on_with_a_relu_in_place_behind(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(800, 4))
    algo = SLB(weight="2bit@channel", act=act, total_steps=3)
    net = algo.apply(net, images())
    for _ in range(4):
        net(images()).square().mean().backward()
        algo.step()
    assert net[0].search.one_hot


@pytest.mark.parametrize("seen", [5, 9])
def test_a_state_of_another_step_of_the_schedule_is_refused_until_the_step_is_set(seen):
    net, algo = prepared(steps=10, t_end=0.8)
    train(net, algo, steps=seen)
    state = copy.deepcopy(net.state_dict())
    train(net, algo, steps=1)
    other, resumed = prepared(steps=10, t_end=0.8)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="after 0 steps with temperature 1, got a state_dict of temperature"):
        resumed.step()
    resumed.steps = seen
    resumed.step()
    assert resumed.steps == seen + 1
    assert torch.equal(other.stem.search.temperature, net.stem.search.temperature)


def test_a_compiled_search_is_one_graph_and_the_temperature_recompiles_nothing():
    options = {"steps": 8, "t_end": 0.75, "act": "uint4@tensor:pact", "batch_norm": "state"}
    (net, algo), (eager, _) = prepared(**options), prepared(**options)
    torch._dynamo.reset()
    compiled = torch.compile(net.train(), fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def step(seed: int) -> torch.Tensor:
        y = compiled(images(seed=seed))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
        return y

    torch.testing.assert_close(step(0), eager.train()(images(seed=0)), rtol=1e-3, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 6):  # two steps at the first temperature, then it falls
            step(seed)
    step(6)  # the codes are chosen: the one recompilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        y = step(7)
    assert net.stem.search.one_hot and torch.isfinite(y).all()


def test_a_step_has_no_host_sync():
    net, algo = prepared(steps=6, act="uint8@tensor:ema", trace=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    modes = Syncs()
    with modes:
        for seed in range(6):
            net.train()(images(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()
    assert modes.seen == [] and net.stem.search.one_hot


@pytest.mark.parametrize(
    "act", ["uint8@tensor:pact", "uint4@tensor:ema", "uint2@tensor:pact", "uint1@tensor:pact", "uint1@tensor:ema"]
)
def test_activations_of_few_bits_train_under_bf16_autocast_and_convert(act):
    net, algo = prepared(steps=5, act=act, rules=[("stem", {"act": "int8@tensor:ema"})], logits="bfloat16")
    algo.calibrate(net, [images(seed=3), images(seed=4)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for seed in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net.train()(images(seed=seed)).float().square().mean()
        loss.backward()
        if seed == 0:
            assert net.fc.search.logits.grad.dtype == torch.bfloat16
            assert net.stem.mixed(images()).dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    algo.convert(net.eval())
    assert algo.parity.layer_error < 1e-5
    summary = algo.summary(net)
    on_integers = summary.count(INTEGER) + summary.count(WITHOUT_VNNI)  # the convolutions of a CPU without VNNI
    assert act.partition(":")[0] in summary and on_integers == 5  # every layer


def test_the_weight_comes_in_the_dtype_and_memory_format_that_the_product_wants():
    net, _ = prepared()
    x = torch.randn(2, 6, 12, 12).to(memory_format=torch.channels_last)
    conv = net.block.conv1.train()
    with torch.autocast("cpu", torch.bfloat16):
        weight = conv.mixed(x)
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight, conv.mixed(x.contiguous()).bfloat16(), rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    net = SLB(weight="4bit@channel:learned", act="int8@tensor:ema", total_steps=4).apply(mlp(), x).train()
    twin = copy.deepcopy(net)
    net(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_casting_and_moving_a_model_keeps_scales_and_temperature_in_fp32():
    net, algo = prepared()
    algo.step()
    before = {key: value.clone() for key, value in net.stem.search.state_dict().items()}
    net.bfloat16().float()
    for key in ("scale", "levels", "temperature"):
        assert torch.equal(net.stem.search.state_dict()[key], before[key])
    assert net.bfloat16().stem.search.logits.dtype == torch.bfloat16


def test_pact_clips_to_a_learned_bound_and_its_gradient_is_that_of_what_is_clipped():
    q = PactQuantizer(Scheme.parse("uint2@tensor", "act"), torch.device("cpu"))
    q.set_range(torch.tensor([0.0]), torch.tensor([3.0]))
    x = torch.tensor([-1.0, 0.4, 1.6, 2.9, 3.0, 5.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [0.0, 0.0, 2.0, 3.0, 3.0, 3.0]
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
    assert q.alpha.grad.tolist() == [48.0]
    signed = PactQuantizer(Scheme.parse("int4@tensor", "act"), torch.device("cpu"))
    signed.set_range(torch.tensor([-7.0]), torch.tensor([3.0]))
    x = torch.tensor([-9.0, -2.2, 8.0], requires_grad=True)
    y = signed(x)
    assert y.tolist() == [-7.0, -2.0, 7.0]
    y.backward(torch.ones(3) * torch.tensor([1.0, 2.0, 4.0]))
    assert x.grad.tolist() == [0.0, 2.0, 0.0] and signed.alpha.grad.tolist() == [3.0]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_fused_optimizer_trains_as_torch_does_and_freezes_exactly(kind):
    rules = [("block", {"weight": "4bit@channel"}), ("fc", {"weight": "1bit@tensor"})]
    fused, algo = prepared(steps=6, t_end=0.7, fused=True, rules=rules, batch_norm="state")
    plain, other = prepared(steps=6, t_end=0.7, rules=rules, batch_norm="state")
    if kind == "adamw":
        search: torch.optim.Optimizer = SlbAdamW(algo.fused_layers(), lr=0.01, weight_decay=0.1)
        want: torch.optim.Optimizer = torch.optim.AdamW(other.logits(), lr=0.01, weight_decay=0.1)
    else:
        layers = algo.fused_layers()
        search = SlbSGD([{"layers": layers[:2]}, {"layers": layers[2:], "lr": 2.0}], lr=0.5, momentum=0.9)
        groups = [{"params": other.logits()[:2]}, {"params": other.logits()[2:], "lr": 2.0}]
        want = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    rest = [torch.optim.SGD(a.parameters(net), lr=0.05) for a, net in ((algo, fused), (other, plain))]
    for seed in range(6):
        for net, a, optimizers in ((fused, algo, (search, rest[0])), (plain, other, (want, rest[1]))):
            net.train()(images(seed=seed)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            a.step()
        if seed == 4:  # the codes have just been chosen
            chosen = fused.stem.search.logits.detach().clone()
    for name, layer in fused.named_modules():
        if hasattr(layer, "search"):
            torch.testing.assert_close(
                layer.search.logits, plain.get_submodule(name).search.logits, rtol=1e-4, atol=1e-5
            )
            assert layer.search.logits.grad is None
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()), rtol=1e-3, atol=1e-4)
    assert fused.stem.search.one_hot
    fused.stem.weight.grad = torch.ones_like(fused.stem.weight)
    search.step()
    assert torch.equal(fused.stem.search.logits, chosen)
    algo.convert(fused)
    assert algo.parity.layer_error < 1e-6


def test_a_fused_search_saves_and_resumes_exactly(tmp_path):
    def run(net, algo, optimizer, seeds):
        for seed in seeds:
            net.train()(images(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()

    whole, algo = prepared(fused=True)
    run(whole, algo, SlbAdamW(algo.fused_layers()), range(6))
    part, algo = prepared(fused=True)
    optimizer = SlbAdamW(algo.fused_layers())
    run(part, algo, optimizer, range(3))
    resumed = gs_algos.load(gs_algos.save(part, tmp_path), SmallConvNet)
    algo = SLB.resume(resumed)
    again = SlbAdamW(algo.fused_layers())
    again.load_state_dict(optimizer.state_dict())
    run(resumed, algo, again, range(3, 6))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_converting_early_warns_with_the_gap_and_takes_the_largest_logits(caplog):
    net, algo = prepared(steps=10)
    train(net, algo, steps=2)
    gaps = algo.gaps()
    worst = max(gaps, key=gaps.get)
    want = net.eval()(images(seed=9))
    with caplog.at_level(logging.WARNING):
        algo.convert(net)
    assert "5 of 5 layers are not chosen before step 6, got step 2" in caplog.text
    assert f"{100 * gaps[worst]:.1f} % in {worst}" in caplog.text
    torch.testing.assert_close(net(images(seed=9)), want)


OPTIONS = [
    ({"weight": "3bit"}, "weight must look like int<1|2|4|8>@<tensor|channel>[:lsq] or <1|2|4|8>bit"),
    ({"weight": "2bit:learned"}, "a learned scale needs @tensor or @channel"),
    ({"weight": "int4@group:64"}, "weight must have a scale per tensor or channel"),
    ({"t0": 0.0}, "t0 must be a number > 0, got 0.0"),
    ({"t0": float("nan")}, "t0 must be a number > 0, got nan"),
    ({"t_start": 0.7}, r"t_end must be a share of the steps, in [t_start, 1] = [0.7, 1], got 0.6"),
    ({"t_factor": -1.0}, "t_factor must be a number > 0"),
    ({"total_steps": 0}, "total_steps must be a number of steps >= 1, got 0"),
    ({"init": "zeros"}, "init must be one of weights, random, got 'zeros'"),
    ({"act": "int1@tensor:pact"}, "use uint1"),
    ({"act": "uint4@tensor:ema:pact"}, "takes no other word"),
    ({"act": "uint9@tensor:pact"}, "must have 1 to 8 bits"),
    ({"ends": "5bit"}, "weight must look like"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_a_wrong_option_is_refused_with_what_holds(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        SLB(**options)


def test_wrong_orders_and_models_are_refused_and_leave_the_model_as_it_was():
    with pytest.raises(TypeError, match="got t_stop; did you mean t_start"):
        SLB(t_stop=0.5)
    with pytest.raises(ValueError, match="total_steps must be the optimizer steps of the whole training, got None"):
        SLB().apply(SmallConvNet(), images())
    net = SmallConvNet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    cases = [
        ({"weight": "2bit"}, "SLB: fc: levels from -1 to 1 need a batch norm .* use 2bit@channel"),
        ({"fused": True, "weight": "2bit@channel:learned"}, "stem: a fused optimizer trains logits alone"),
        ({"rules": [("nothing", None)]}, "every rule must match a layer"),
        ({"rules": [("type:Conv2d", None), ("fc", None)]}, "at least one layer must be quantizable, got none"),
        ({"rules": [("fc", {"wieght": "1bit"})]}, "did you mean weight"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            SLB(total_steps=4, **options).apply(net, images())
    broken = SmallConvNet()
    broken.stem.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"SLB\.apply: stem\.weight must be finite"):
        SLB(total_steps=4).apply(broken, images())
    with pytest.raises(ValueError, match="must be finite"):
        SLB(total_steps=4, act="uint8@tensor:ema").apply(net, images() * float("inf"))
    assert type(net.stem) is nn.Conv2d and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    algo = SLB(total_steps=4)
    for call in (algo.step, algo.gaps, algo.traces, algo.logits):
        with pytest.raises(RuntimeError, match="call apply"):
            call()
    with pytest.raises(RuntimeError, match=r"must be one that apply prepared, got one that is float"):
        algo.convert(net)
    algo.apply(net, images())
    with pytest.raises(RuntimeError, match="must not be searched yet, got one that is prepared"):
        SLB(total_steps=4).apply(net, images())
    with pytest.raises(ValueError, match="give either batches or forward_loop"):
        algo.calibrate(net)
    with pytest.raises(ValueError, match=r"layers must be those of SLB\.fused_layers\(\)"):
        SlbAdamW([net.block.conv1])
    net.stem.search.logits.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"stem\.search\.logits must be finite"):
        algo.convert(net)


def test_a_state_of_another_schedule_or_another_shape_is_refused(tmp_path):
    net, _ = prepared(steps=10)
    other, _ = prepared(steps=20)
    with pytest.raises(
        RuntimeError, match="must be the 20 steps of this schedule, got 10; resume with the total_steps"
    ):
        other.load_state_dict(net.state_dict())
    folder = gs_algos.save(net, tmp_path)
    again = gs_algos.load(folder, SmallConvNet)
    with pytest.raises(ValueError, match=r"SLB\.resume: total_steps must be 10, as the search began, got 30"):
        SLB.resume(again, total_steps=30)
    assert SLB.resume(again, total_steps=10, weight="2bit@channel").steps == 0

    class Wider(SmallConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 7)

    with pytest.raises(ValueError, match=r"fc.* must be \(7.* got \(4"):
        gs_algos.load(folder, Wider)
    with pytest.raises(RuntimeError, match="must be one that was saved while prepared by SLB"):
        SLB.resume(SmallConvNet())


def test_more_steps_than_planned_leave_the_codes_as_they_are():
    net, algo = prepared(steps=3)
    train(net, algo, steps=5)
    weight = net.stem.weight.clone()
    train(net, algo, steps=2)
    assert algo.steps == 7 and torch.equal(net.stem.weight, weight)


def test_what_is_saved_for_backward_is_the_weight_and_never_the_softmax():
    torch.manual_seed(0)
    x = torch.randn(4, 256)
    net = SLB(weight="4bit@channel", total_steps=4).apply(nn.Sequential(nn.Linear(256, 128)), x).train()
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    logits = net[0].search.logits
    assert saved.pop(logits.data_ptr()) == 16 * 4 * 128 * 256  # the parameter itself
    assert sum(saved.values()) <= 1.1 * 4 * 128 * 256 + x.untyped_storage().nbytes()
