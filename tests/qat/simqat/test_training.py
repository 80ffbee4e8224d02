"""Training a prepared network as people train: schedules, hooks, optimizers, autocast, checkpointing, compile."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gs_algos import SimQAT
from gs_algos.quant.fake_quant.quantizers import WeightQuantizer
from gs_algos.quant.scheme import Scheme
from gs_kernels import PerChannel, fake_quant
from tests.nets.convolutional import SmallConvNet, images, mlp, train


class Syncs(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU; under a dispatch mode the ops skip their CPU checks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def prepared(**options):
    torch.manual_seed(0)
    algo = SimQAT(**options)
    return algo.apply(SmallConvNet(), images()), algo


def test_apply_keeps_objects_names_optimizers_and_hooks_alive():
    torch.manual_seed(0)
    net = SmallConvNet()
    keys, parameters = list(net.state_dict()), dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    called = []
    net.block.register_forward_hook(lambda *_: called.append("block"))
    net.fc.register_full_backward_hook(lambda *_: called.append("fc"))
    algo = SimQAT()
    same = algo.apply(net, images())
    assert same is net
    assert all(dict(net.named_parameters())[k] is p for k, p in parameters.items())
    assert [k for k in net.state_dict() if k in keys] == keys
    called.clear()
    before = net.stem.weight.detach().clone()
    train(net, algo, steps=1, optimizer=optimizer)
    assert {"block", "fc"} <= set(called)
    assert not torch.equal(before, net.stem.weight)


def test_plan_touches_nothing():
    net = SmallConvNet().train()
    net.bn.eval()
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    SimQAT().plan(net, images())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(state, torch.get_rng_state())
    assert type(net.stem) is nn.Conv2d


def test_quantization_starts_after_its_delay():
    net, algo = prepared(quant_delay=(2, 1), fold_bn=False)
    reference = SmallConvNet().eval()
    reference.load_state_dict({k: v for k, v in net.state_dict().items() if k in reference.state_dict()})
    net.eval()
    torch.testing.assert_close(net(images()), reference(images()), rtol=1e-5, atol=1e-6)
    algo.step()
    assert bool(net.stem.weight_quantizer.gate) and not bool(net.stem.input_quantizer.gate)
    algo.step()
    assert bool(net.stem.input_quantizer.gate)
    assert not torch.allclose(net(images()), reference(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
def test_batch_norm_stands_still_after_freeze(fold):
    net, algo = prepared(freeze_bn=2, fold_bn=fold)
    train(net, algo, steps=2)
    before = net.bn.running_mean.clone(), net.bn.running_var.clone()
    train(net, algo, steps=2)
    assert torch.equal(net.bn.running_mean, before[0]) and torch.equal(net.bn.running_var, before[1])


@pytest.mark.parametrize("fold", ["one_conv", "two_conv"])
def test_unquantized_fold_equals_the_float_batch_norm_in_training(fold):
    net, _ = prepared(fold_bn=fold, quant_delay=10, weight="int8@channel")
    reference = SmallConvNet()
    reference.load_state_dict({k: v for k, v in net.state_dict().items() if k in reference.state_dict()})
    x = images(16, seed=2)
    y, want = net.train()(x), reference.train()(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    for name, parameter in reference.named_parameters():
        got = dict(net.named_parameters())[name].grad
        torch.testing.assert_close(got, parameter.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(net.bn.running_var, reference.bn.running_var)
    torch.testing.assert_close(net.block.bn2.running_mean, reference.block.bn2.running_mean)


@pytest.mark.parametrize("fold", ["one_conv", "two_conv"])
def test_the_grid_of_a_folded_weight_follows_the_batch_norm_at_each_step(fold):
    net, algo = prepared(fold_bn=fold)
    before = net.stem.sigma.clone()
    train(net, algo, steps=2)
    assert torch.equal(net.stem.sigma, (net.bn.running_var + net.bn.eps).sqrt())
    assert not torch.equal(net.stem.sigma, before)


def test_unquantized_freezable_batch_norm_equals_the_float_one():
    net, _ = prepared(fold_bn=False, freeze_bn=5, quant_delay=10)
    reference = SmallConvNet()
    reference.load_state_dict({k: v for k, v in net.state_dict().items() if k in reference.state_dict()})
    torch.testing.assert_close(net.train()(images()), reference.train()(images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn.running_var, reference.bn.running_var)


def test_ema_moves_by_its_share_and_the_first_batch_replaces_the_start():
    net, algo = prepared(act="int8@tensor:ema=0.25")
    q = net.stem.input_quantizer
    one, two = images(seed=1), images(seed=2) * 3
    net.train()
    net(one)
    algo.step()
    torch.testing.assert_close(q.range, torch.stack([-one.min(), one.max()]))
    net(two)
    algo.step()
    want = 0.75 * torch.stack([-one.min(), one.max()]) + 0.25 * torch.stack([-two.min(), two.max()])
    torch.testing.assert_close(q.range, want)
    net(one)  # a smaller batch pulls it back: nothing is left of the larger one
    algo.step()
    torch.testing.assert_close(q.range, 0.75 * want + 0.25 * torch.stack([-one.min(), one.max()]))


@pytest.mark.parametrize("observer", ["ema=0.25", "minmax"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_batch_that_is_not_finite_moves_no_range(observer, value):
    net, algo = prepared(act=f"int8@tensor:{observer}")
    q = net.stem.input_quantizer
    bad = images(seed=2)
    bad[0, 0, 0, 0] = value
    net.train()
    for x in (bad, images(seed=1), bad):  # as the first batch too
        net(x)
        algo.step()
    x = images(seed=1)
    torch.testing.assert_close(q.range, torch.stack([-x.min(), x.max()]))
    assert q.scale.isfinite() and q.steps.item() == 1


def test_what_was_seen_before_a_state_is_loaded_is_forgotten():
    net, algo = prepared(act="int8@tensor:minmax")
    train(net, algo, steps=1)
    state = copy.deepcopy(net.state_dict())
    net(images() * 1000)
    net.load_state_dict(state)
    algo.step()
    assert torch.equal(net.stem.input_quantizer.range, state["stem.input_quantizer.range"])


def test_learnt_steps_take_part_in_an_empty_batch_with_a_gradient_of_zero():
    net, _ = prepared(act="int8@tensor:lsq")
    net.train()(images(0)).sum().backward()
    steps = [p for name, p in net.named_parameters() if name.endswith("input_quantizer.scale")]
    assert steps and all(p.grad is not None and not p.grad.any() for p in steps)  # DDP waits for it


def test_batches_that_share_one_step_count_with_all_they_hold():
    net, algo = prepared(act="int8@tensor:ema=1.0")
    net.train()
    for scale in (1.0, 5.0, 2.0):  # gradient accumulation
        net(images(seed=3) * scale)
    algo.step()
    x = images(seed=3) * 5
    torch.testing.assert_close(net.stem.input_quantizer.range, torch.stack([-x.min(), x.max()]))


def test_minmax_keeps_the_extremes():
    net, algo = prepared(act="int8@tensor:minmax")
    net.train()
    for scale in (1.0, 4.0, 0.5):
        net(images(seed=3) * scale)
        algo.step()
    torch.testing.assert_close(net.stem.input_quantizer.range[1], images(seed=3).max() * 4)


def test_calibration_sets_percentile_ranges_and_training_keeps_them():
    net, algo = prepared(act="int8@tensor:percentile=90")
    x = images(64, seed=4)
    algo.calibrate(net, [x])
    q = net.stem.input_quantizer
    assert float(q.range[1]) < 0.8 * float(x.max())
    before = q.range.clone()
    train(net, algo, steps=2)
    assert torch.equal(q.range, before)


def test_calibration_takes_a_forward_loop():
    net, algo = prepared()
    algo.calibrate(net, forward_loop=lambda model: model(images(seed=9) * 2))
    torch.testing.assert_close(net.stem.input_quantizer.range[1], images(seed=9).max() * 2)


def test_evaluation_does_not_observe():
    net, algo = prepared()
    net.eval()
    before = net.stem.input_quantizer.range.clone()
    net(images() * 100)
    algo.step()
    assert torch.equal(net.stem.input_quantizer.range, before)


def test_learned_steps_get_gradients_and_stay_positive():
    net, algo = prepared(weight="int4@channel:lsq", act="int4@tensor:lsq")
    # five layers with a weight step, an input step and an input zero point; one step and zero point for the add
    assert len(algo.learned_parameters()) == 5 * 3 + 2
    optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
    net.train()
    net(images()).square().sum().backward()
    assert float(net.stem.weight_quantizer.scale.grad.abs().sum()) > 0
    assert float(net.fc.input_quantizer.scale.grad.abs().sum()) > 0
    optimizer.step()
    algo.step()
    assert all(q.min().item() > 0 for q in (net.stem.weight_quantizer.scale, net.fc.input_quantizer.scale))


def test_the_gradient_of_a_learned_step_is_scaled_by_its_elements_and_levels():
    """Esser et al. 2020, section 2.2: g = 1 / sqrt(N * qmax)."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(Scheme.parse("int4@channel:lsq", "weight"), weight)
    quantizer.initialize(weight)
    step = quantizer.scale.detach().clone().requires_grad_()
    fake_quant(weight, step, torch.zeros(3), qmin=-8, qmax=7, granularity=PerChannel(0)).square().sum().backward()
    quantizer(weight).square().sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, step.grad / (40 * 7) ** 0.5)


@pytest.mark.parametrize("granularity", ["channel", "group:16", "tensor"])
def test_learned_steps_start_at_the_least_error_where_the_scheme_says_so(granularity):
    weight, errors = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), {}
    for flags in ("", ":lsq", ":mse", ":mse:lsq"):
        quantizer = WeightQuantizer(Scheme.parse(f"int2@{granularity}{flags}", "weight"), weight)
        quantizer.initialize(weight)
        errors[flags] = float((quantizer(weight) - weight).square().sum().detach())
    assert errors[":mse:lsq"] == pytest.approx(errors[":mse"], rel=1e-5)
    assert errors[":mse:lsq"] < 0.95 * errors[":lsq"]


@pytest.mark.parametrize("weight, act", [("int4@channel:lsq", "int8@tensor:lsq"), ("int4@channel:mse", "int8@tensor")])
def test_a_cast_of_the_model_leaves_ranges_and_steps_as_they_are(weight, act):
    torch.manual_seed(0)
    net, algo = mlp(), SimQAT(weight=weight, act=act)
    algo.apply(net, torch.randn(8, 16))
    before = {key: value.clone() for key, value in net.state_dict().items() if "quantizer" in key}
    steps = algo.learned_parameters()
    net.train().bfloat16()(torch.randn(8, 16).bfloat16())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert net[0].weight.dtype == torch.bfloat16 and net[0].input_quantizer.pending.dtype == torch.float32
    assert all(a is b for a, b in zip(algo.learned_parameters(), steps, strict=True))


def test_a_step_has_no_host_sync():
    net, algo = prepared(quant_delay=1, freeze_bn=2, fold_bn="two_conv")
    net.train()
    modes = Syncs()
    x = images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with modes:
        for _ in range(3):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()
    assert modes.seen == []


def plain() -> nn.Module:
    layers = nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6 * 25, 4))


# inductor takes seconds for each layer
@pytest.mark.parametrize(
    ("fold", "backend", "make"), [("one_conv", "inductor", plain), ("two_conv", "aot_eager", SmallConvNet)]
)
def test_compiled_step_is_one_graph_and_never_recompiles(fold, backend, make):
    torch.manual_seed(0)
    algo = SimQAT(quant_delay=2, freeze_bn=3, fold_bn=fold)
    net = algo.apply(make(), images())
    eager = copy.deepcopy(net)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net.train(), fullgraph=True, backend=backend)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for seed in range(5):
            y = compiled(images(seed=seed))
            if seed == 0:
                torch.testing.assert_close(y, eager.train()(images(seed=0)), rtol=1e-3, atol=1e-4)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_bf16_autocast_trains_and_converts():
    net, algo = prepared()
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images(seed=seed)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    assert net.stem.weight.grad is None and torch.isfinite(net.stem.weight).all()
    algo.convert(net.eval())
    assert algo.parity.layer_error < 1e-5


@pytest.mark.parametrize("act", ["int8@tensor:ema", "int8@tensor:lsq"])
def test_gradient_checkpointing_changes_nothing(act):
    torch.manual_seed(0)
    algo = SimQAT(weight="int4@channel", act=act)
    net = algo.apply(mlp(), torch.randn(8, 16)).train()
    twin = copy.deepcopy(net)
    x = torch.randn(8, 16)
    net(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert torch.equal(net[0].input_quantizer.pending, twin[0].input_quantizer.pending)


def test_memory_saved_for_backward_is_the_input_alone():
    net, _ = prepared()
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(64, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.fc.input_quantizer.train()(x)
    beyond = sum(saved.values()) - x.untyped_storage().nbytes()
    assert beyond <= 0.05 * x.untyped_storage().nbytes()
