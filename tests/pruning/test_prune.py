"""SCOP and the plain importances: both phases in a user's own loop, what is learned, what is cut, kept and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SCOP, Prune, SimQAT
from gs_algos.core.algorithm import history
from gs_algos.export.onnx import export_onnx
from gs_algos.pruning.knockoffs import GivenKnockoffs, KnockoffGenerator, discrepancy
from tests.nets.convolutional import SmallConvNet, images, mlp


def train(net: nn.Module, algo, steps: int, optimizer: torch.optim.Optimizer | None = None, first: int = 0) -> None:
    """A user's loop on random data; batch i is the same in every call."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05)
    net.train()
    for i in range(first, first + steps):
        loss = F.cross_entropy(net(images(seed=i)), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallConvNet()


def evaluated(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net.eval()(images() if x is None else x)


@pytest.mark.parametrize("made", ["before", "after"])
def test_first_phase_moves_beta_alone_and_second_phase_the_rest(made):
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) if made == "before" else None
    algo = SCOP(select_steps=3)
    same = algo.apply(net, images())
    assert same is net and type(net.stem) is not nn.Conv2d
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    want = evaluated(net)
    train(net, algo, 2, optimizer)
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"{name}.gate{kind}" for name in GATED for kind in ("", "_mean", "_square")}
    assert torch.equal(evaluated(net), want)  # beta mixes in training only
    train(net, algo, 3, optimizer)
    assert int(net.kept_units.sum()) == 3 + 4 + 4
    assert not torch.equal(net.stem.weight, before["stem.weight"])
    assert not torch.equal(net.bn.running_mean, before["bn.running_mean"])


GATED = ("stem", "block.conv1", "block.conv2", "block.project.0")


def test_the_first_phase_computes_the_paper_s_mixture_and_adam_moves_beta():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    knockoff = torch.randn(4, 5)
    algo = SCOP(select_steps=9, knockoffs=[knockoff], lr=0.1)
    twin = copy.deepcopy(net)
    algo.apply(net, x)
    got = net(x)
    # y = BN([beta A + (1 - beta) A~; A~]), the statistics those of both halves
    beta = torch.full((6,), 0.5, requires_grad=True)
    real, other = x @ twin[0].weight.t(), knockoff @ twin[0].weight.t()
    both = torch.cat([beta * real + (1 - beta) * other, other])
    normal = (both - both.mean(0)) / (both.var(0, correction=0) + 1e-5).sqrt()
    want = twin[3](F.relu(normal))[:4]
    torch.testing.assert_close(got, want)
    F.cross_entropy(got, target).backward()
    F.cross_entropy(want, target).backward()
    assert net[0].weight.grad is None and net[1].weight.grad is None
    torch.testing.assert_close(net[0].gate.grad, beta.grad)
    algo.step()
    torch.testing.assert_close(net[0].gate.detach(), 0.5 - 0.1 * beta.grad.sign())  # Adam's first step


def test_beta_stays_in_0_1_and_the_worst_units_go():
    net = small()
    algo = SCOP(rate=0.25, select_steps=30, lr=0.2)
    algo.apply(net, images())
    train(net, algo, 29)
    assert all(0 <= b <= 1 for name in GATED for b in net.get_submodule(name).gate.tolist())
    scores = (net.block.bn1.weight.abs() * (2 * net.block.conv1.gate - 1)).detach()
    worst = scores.argsort()[:2].tolist()
    # one more step of beta cannot be foreseen: the same state decides
    algo.steps = 30
    algo._select()
    assert (~net.kept_units[6:14]).nonzero().flatten().tolist() == sorted(worst)
    assert not net.block.conv1.weight[worst].any()
    assert not net.block.conv2.weight[:, worst].any()
    assert not net.block.bn1.bias[worst].any()


def test_zeros_stay_zeros_whatever_the_optimizer_does():
    net = mlp()
    net[1] = nn.Sigmoid()  # makes 1/2 of a zero, so its reader gets gradients
    algo = Prune(importance="l2")
    net = algo.apply(net, torch.randn(4, 16))
    gone = (~net.kept_units[:32]).nonzero().flatten()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        algo.step()
    assert not net[2].weight[:, gone].any() and not net[0].bias[gone].any()
    want = evaluated(net, torch.ones(1, 16))
    net = algo.convert(net)
    torch.testing.assert_close(evaluated(net, torch.ones(1, 16)), want)
    assert (net[0].out_features, net[2].in_features) == (16, 16) and algo.error < 1e-6


def test_an_optimizer_that_is_cut_along_trains_as_the_masked_one():
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for i in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(images(seed=i).double()), torch.arange(8) % 4).backward()
            optimizer.step()

    net = small().double()  # Adam makes whole steps of rounding errors where a gradient is zero
    algo = Prune(rate=0.4, importance="random", seed=1)
    algo.apply(net, images().double())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    steps(net, optimizer)
    loss = net(images(seed=9).double()).sum()  # its graph remembers the old shapes
    masked = copy.deepcopy(net)
    theirs = torch.optim.Adam(masked.parameters(), lr=0.01)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    algo.convert(net, optimizers=[optimizer])
    assert loss.isfinite() and {len(optimizer.state[p]["exp_avg"]) for p in net.stem.parameters()} == {4}
    steps(net, optimizer)
    steps(masked, theirs)
    x = images().double()
    torch.testing.assert_close(evaluated(net, x), evaluated(masked, x), rtol=1e-9, atol=1e-12)


def test_refresh_gives_the_statistics_of_all_batches():
    net = small()
    algo = Prune()
    algo.apply(net, images())
    weights = net.stem.weight.clone()
    algo.refresh(net, [images(seed=1), images(seed=2)])
    y = [F.conv2d(images(seed=i), net.stem.weight, padding=1) for i in (1, 2)]
    torch.testing.assert_close(net.bn.running_mean, (y[0].mean((0, 2, 3)) + y[1].mean((0, 2, 3))) / 2)
    assert net.bn.momentum == 0.1 and torch.equal(net.stem.weight, weights)


@pytest.mark.parametrize("importance", ["l1", "l2", "bn", "random", "taylor"])
def test_importances_cut_the_lowest(importance):
    net = small()
    with torch.no_grad():
        net.block.conv1.weight[3] *= 1e-3
        net.block.bn1.weight[3] *= 1e-3
    algo = Prune(rate=0.13, importance=importance, select_steps=2 if importance == "taylor" else 0)
    algo.apply(net, images())
    train(net, algo, 3)
    gone = (~net.kept_units[6:14]).nonzero().flatten().tolist()
    assert len(gone) == 1 and (importance == "random" or gone == [3])


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(at, tmp_path):
    whole = small()
    algo = SCOP(select_steps=4)
    algo.apply(whole, images())
    train(whole, algo, 7)
    net = small()
    algo = SCOP(select_steps=4)
    algo.apply(net, images())
    train(net, algo, at)
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, small)
    algo = SCOP.resume(again)
    assert algo.steps == at and algo.selecting == (at < 4)
    train(again, algo, 7 - at, first=at)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(RuntimeError, match="has no example inputs; give example_inputs"):
        algo.convert(again)
    algo.convert(again, images())


def test_a_cut_network_loads_into_the_unpruned_builder(tmp_path):
    net = small()
    algo = Prune(rate=0.5)
    net = algo.convert(algo.apply(net, images()))
    gs_algos.save(net, tmp_path)
    index = json.loads((tmp_path / "golden_stick.json").read_text())
    assert index["history"][0]["shapes"]["block.conv1.weight"] == [4, 3, 3, 3]
    again = gs_algos.load(tmp_path, lambda: small(seed=5))
    assert torch.equal(evaluated(again), evaluated(net)) and str(again) == str(net)
    assert history(again)[0]["stage"] == "converted" and "4 of 8" in algo.summary(again)


def test_a_loaded_cut_network_computes_the_same_in_channels_last(tmp_path):
    """One input channel: the strides of both memory formats fit the first weight, and a convolution reads them."""

    def build() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
        return net.to(memory_format=torch.channels_last)

    torch.manual_seed(0)
    net, x = build(), torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last)
    algo = Prune(rate=0.5)
    net = algo.convert(algo.apply(net, x))
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, build)
    assert net[0].weight.shape[0] == 4 and net[2].weight.shape[:2] == (4, 4)
    assert [p.stride() for p in again.parameters()] == [p.stride() for p in net.parameters()]
    assert torch.equal(evaluated(again, x), evaluated(net, x))


def test_a_cut_network_exports(tmp_path):
    """ONNX Runtime and torch.export compute what the cut network does; both hold the cut shapes."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the dev extra")
    net = small()
    algo = SCOP(rate=0.5, select_steps=1)
    algo.apply(net, images())
    train(net, algo, 3)
    net = algo.convert(net).eval()
    want = evaluated(net)
    exported = torch.export.export(net, (images(),))
    assert exported.state_dict["block.conv1.weight"].shape == (4, 3, 3, 3)
    torch.testing.assert_close(exported.module()(images()), want)
    session = ort.InferenceSession(export_onnx(net, images(), tmp_path / "cut.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


def test_scop_then_simqat_is_one_stack(tmp_path):
    net = small()
    scop = SCOP(rate=0.5, select_steps=2)
    net = scop.apply(net, images())
    train(net, scop, 4)
    net = scop.convert(net)
    qat = SimQAT()
    net = qat.apply(net, images())
    train(net, qat, 2)
    net = qat.convert(net)
    gs_algos.save(net, tmp_path)
    again = gs_algos.load(tmp_path, small)
    assert [(e["algorithm"], e["stage"]) for e in history(again)] == [("scop", "converted"), ("simqat", "converted")]
    assert torch.equal(evaluated(again), evaluated(net))
    assert len(again.block.conv1.codes) == 4 and again.stem.codes.numel() == 3 * 9


def test_pruning_twice_prunes_what_is_left(tmp_path):
    net = small()
    for _ in range(2):
        algo = Prune(rate=0.5)
        net = algo.convert(algo.apply(net, images()))
    assert (net.stem.out_channels, net.block.conv1.out_channels) == (2, 2)  # 6 -> 3 -> 2, 8 -> 4 -> 2
    gs_algos.save(net, tmp_path)
    assert torch.equal(evaluated(gs_algos.load(tmp_path, small)), evaluated(net))


def test_a_copy_may_be_cut_while_training_goes_on():
    net = small()
    algo = SCOP(select_steps=1)
    algo.apply(net, images())
    train(net, algo, 2)
    twin = algo.convert(copy.deepcopy(net))
    train(net, algo, 1)
    assert twin.stem.out_channels == 3 and net.stem.out_channels == 6
    assert not twin._forward_pre_hooks and not twin._forward_hooks_always_called
    assert evaluated(twin).shape == (8, 4)


def test_the_cut_network_exports():
    net = small()
    algo = Prune()
    net = algo.convert(algo.apply(net, images())).eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(3)), evaluated(net, images(3)))


def test_a_cut_network_runs_in_onnx_runtime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = small()
    algo = Prune()
    net = algo.convert(algo.apply(net, images())).eval()
    torch.onnx.export(net, (images(),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), evaluated(net), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_trains_both_phases():
    net = small()
    algo = SCOP(select_steps=2)
    algo.apply(net, images())
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05)
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(images(seed=seed)).float(), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    assert net.stem.gate.dtype == torch.float32 and algo.convert(net).stem.out_channels == 3


def test_a_prepared_network_moves_and_changes_type():
    net = small()
    algo = SCOP(select_steps=3)
    algo.apply(net, images())
    net.to(torch.float64).to(torch.float32)
    assert net.stem.gate.is_leaf and net.stem.gate.requires_grad and net.stem.gate.dtype == torch.float32
    train(net, algo, 2)
    assert bool((net.stem.gate != 0.5).all())


def test_knockoffs_come_from_any_iterable_and_start_again():
    given = GivenKnockoffs([torch.zeros(10, 3), torch.ones(10, 3)])
    rows = [given(((torch.randn(8, 3),), {}), 8)[0][0] for _ in range(3)]
    assert [float(r.mean()) for r in rows] == [0, 1, 0] and rows[0].shape == (8, 3)


def test_permuted_knockoffs_never_meet_themselves():
    net, seen = small(), []
    net.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    algo = SCOP(select_steps=9)
    algo.apply(net, images())
    seen.clear()
    train(net, algo, 8)
    for i, x in enumerate(seen):
        real, other = x.chunk(2)
        assert torch.equal(real, images(seed=i)) and sorted(other.sum((1, 2, 3)).tolist()) == sorted(
            real.sum((1, 2, 3)).tolist()
        )
        assert not bool((real == other).flatten(1).all(1).any())


def test_a_fitted_generator_is_nearer_to_the_data_than_noise():
    random = torch.Generator().manual_seed(0)
    rows = torch.linspace(-1, 1, 8).view(1, 1, 8, 1)
    x = rows * torch.rand(256, 1, 1, 1, generator=random) + 0.1 * torch.randn(256, 1, 8, 8, generator=random)
    torch.manual_seed(0)
    generator = KnockoffGenerator((1, 8, 8), width=16, batch_size=64).fit(x.split(64), steps=60)
    fake = next(iter(generator))
    noise = x.mean() + x.std() * torch.randn(64, 1, 8, 8, generator=random)
    real = x[:64].flatten(1)
    assert fake.shape == (64, 1, 8, 8) and torch.equal(fake, next(iter(generator)))
    assert discrepancy(fake.flatten(1), real) < 0.2 * discrepancy(noise.flatten(1), real)
    net = small()
    algo = SCOP(select_steps=1, knockoffs=KnockoffGenerator((1, 12, 12), batch_size=8))
    train(algo.apply(net, images()), algo, 1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.out(F.relu(self.fc(x + y))) * scale}


def test_keyword_inputs_are_doubled_and_dict_outputs_halved():
    net = TwoInputs()
    inputs = {"x": torch.randn(6, 4), "y": torch.randn(6, 4), "scale": 2.0}
    algo = SCOP(select_steps=2)
    algo.apply(net, inputs)
    assert net.train()(**inputs)["logits"].shape == (6, 2)


def prepared(**options) -> tuple[nn.Module, SCOP]:
    net, algo = small(), SCOP(**{"select_steps": 2, **options})
    return algo.apply(net, images()).train(), algo


def test_a_loss_inside_the_model_is_refused():
    class Loss(SmallConvNet):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y.square().mean(), y

    net = Loss()
    SCOP(select_steps=2).apply(net, images())
    with pytest.raises(ValueError, match="the loss must be computed outside of the model"):
        net.train()(images())


@pytest.mark.parametrize(
    "knockoffs, words",
    [
        ([torch.zeros(8, 1, 12, 11)], r"shape of the batch it stands beside, \[8, 1, 12, 12\], got \[8, 1, 12, 11\]"),
        ([torch.zeros(7, 1, 12, 12)], r"got \[7, 1, 12, 12\]"),
        ([(torch.zeros(8, 1, 12, 12), torch.zeros(8))], "must be made like the model's inputs"),
        ([], "must give at least one batch, got none"),
    ],
    ids=["other shape", "too few", "with labels", "none"],
)
def test_knockoffs_of_another_shape_are_refused(knockoffs, words):
    net, _ = prepared(knockoffs=knockoffs)
    with pytest.raises(ValueError, match=words):
        net(images())
    assert all(p.requires_grad for p in net.parameters()) and net.bn.track_running_stats


def test_one_input_cannot_be_permuted():
    net, _ = prepared()
    with pytest.raises(ValueError, match="must have two inputs to permute, got 1"):
        net(images(1))


@pytest.mark.parametrize(
    "algorithm, options, words",
    [
        (SCOP, {"rate": 1}, r"SCOP: rate must be in \[0, 1\), got 1"),
        (SCOP, {"rate": -0.1}, r"rate must be in \[0, 1\), got -0.1"),
        (Prune, {"rate": "half"}, r"Prune: rate must be in \[0, 1\), got 'half'"),
        (Prune, {"rate": float("nan")}, r"rate must be in \[0, 1\), got nan"),
        (Prune, {"rules": [("fc", {"rate": 2})]}, r"rule fc: rate must be in \[0, 1\), got 2"),
        (SCOP, {"select_steps": 0}, "select_steps must be >= 1"),
        (SCOP, {"knockoffs": "gan"}, "knockoffs must be permute, generator or an iterable"),
        (SCOP, {"lr": 0}, "lr must be > 0"),
        (Prune, {"scope": "network"}, "scope must be layer or global"),
        (Prune, {"round_to": 0}, "round_to must be a whole number >= 1"),
        (Prune, {"importance": "l3"}, "importance must be one of l1, l2, bn, taylor, random"),
        (Prune, {"importance": "taylor"}, "select_steps must be > 0 for taylor"),
        (Prune, {"budget": "half"}, "budget: must be what may remain, as a percentage of channels, params"),
        (Prune, {"budget": "30% latency", "scope": "global"}, "a latency budget needs scope='layer'"),
    ],
)
def test_options_out_of_range_are_refused(algorithm, options, words):
    with pytest.raises(ValueError, match=words):
        algorithm(**options)


def test_a_misspelt_option_is_named():
    with pytest.raises(TypeError, match="got rates; did you mean rate"):
        SCOP(rates=0.4)


def test_calls_in_the_wrong_order_are_refused():
    algo = SCOP(select_steps=2)
    with pytest.raises(RuntimeError, match="must come between apply and convert"):
        algo.step()
    net, algo = prepared()
    with pytest.raises(RuntimeError, match="the cut must be decided, got step 0 of 2"):
        algo.convert(net)
    with pytest.raises(RuntimeError, match="still prepared by scop; convert it first"):
        Prune().apply(net, images())
    with pytest.raises(RuntimeError, match="the model must be one that apply prepared, got one that is float"):
        algo.convert(small())
    net.stem.weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"weights must stand still for 2 steps, got a gradient in stem\.weight"):
        algo.step()


def test_a_network_without_groups_is_refused_and_left_alone():
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="at least one group must lose a unit, got none"):
        Prune().apply(net, torch.randn(2, 4))
    assert list(net.state_dict()) == ["0.weight", "0.bias"] and not history(net)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e["shapes"].update({"stem.weight": [9, 1, 3, 3]}), r"stem.weight must shrink from \[6, 1, 3, 3\]"),
        (lambda e: e["shapes"].update({"stem.weight": [-1, 1, 3, 3]}), "must shrink from"),
        (lambda e: e["shapes"].update({"nothing": [1]}), "must be one of the model, got 'nothing'"),
        (lambda e: e["attributes"].update({"stem": {"forward": 3}}), "stem.forward must be a number of the module"),
        (lambda e: e.pop("shapes"), "KeyError"),
        (lambda e: e.update(attributes=[1]), "AttributeError"),
    ],
)
def test_a_hostile_history_is_a_value_error(change, words, tmp_path):
    algo = Prune()
    gs_algos.save(algo.convert(algo.apply(small(), images())), tmp_path)
    index = json.loads((tmp_path / "golden_stick.json").read_text())
    change(index["history"][0])
    (tmp_path / "golden_stick.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        gs_algos.load(tmp_path, small)
