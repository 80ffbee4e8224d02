"""UniPrune: what a block is worth, rounds after which zeros may grow, the last one, what is cut, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import Pipeline, SimQAT, UniPrune, search_rules
from gs_algos.demo.models.vit import ViT
from gs_algos.pruning.uniprune import block_importance
from tests.nets.convolutional import SmallConvNet, images, mlp


def train(net: nn.Module, algo, steps: int, first: int = 0, lr: float = 0.05) -> None:
    """A user's loop on random data; batch i is the same in every call."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    for i in range(first, first + steps):
        F.cross_entropy(net(images(seed=i)), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()


def evaluated(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallConvNet()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(1, 4, image_size=12, patch=6, dim=24, depth=2, heads=3)


def test_a_block_is_worth_its_median_beside_that_of_the_best():
    scores = torch.tensor([1.0, 9.0, 4.0, 8.0, 2.0, 6.0, 0.5])
    # sorted: 9 8 6 | 4 2 1 | 0.5
    want = torch.tensor([2 / 8, 1, 2 / 8, 1, 2 / 8, 1, 0.5 / 8])
    torch.testing.assert_close(block_importance(scores, 3), want)
    assert block_importance(torch.zeros(4), 2).tolist() == [0, 0, 0, 0]
    assert block_importance(torch.tensor([2.0, 1.0, 4.0]), 9).tolist() == [1, 1, 1]  # one block


def test_the_worst_blocks_of_the_whole_network_go():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    norms = [torch.tensor([8.0, 7, 6, 6, 5, 5, 1, 1]), torch.tensor([1.0, 9, 1, 9, 1, 1, 9, 1])]
    with torch.no_grad():
        for layer, norm in zip((net[0], net[2]), norms, strict=True):
            layer.weight.copy_(norm[:, None] * F.normalize(torch.randn(8, layer.in_features)))
    # blocks of two by their medians beside the best: 1, .8, .67, .13 and 1, .56, .11, .11
    algo = UniPrune(rate=6 / 16, round_to=2, select_steps=0)
    algo.apply(net, torch.randn(2, 4))
    assert net.kept_units[:8].tolist() == [True] * 6 + [False] * 2
    assert int(net.kept_units[8:].sum()) == 4 and net.kept_units[8:][norms[1] == 9].all()


def test_gamma_counts_and_biases_do_not():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([9.0, 9, 0, 0]))
        net[1].weight.copy_(torch.tensor([-8.0, 1, 1, 0.1]))  # 8, 2, 3, .4
    UniPrune(rate=0.5, round_to=2, select_steps=0).apply(net, torch.randn(2, 1, 3, 3))
    assert net.kept_units.tolist() == [True, False, True, False]


def test_zeros_grow_back_until_the_last_round():
    net = small()
    nn.init.constant_(net.block.bn1.bias, 0.5)  # a ReLU lets gradients through
    algo = UniPrune(rate=0.6, scope="layer", round_to=2, select_steps=4, every=2)
    algo.apply(net, images())
    train(net, algo, 1)
    assert net.block.bn1.weight.all()
    weight = net.block.conv1.weight.clone()
    train(net, algo, 1, first=1)
    gone = (net.block.bn1.weight == 0).nonzero().flatten()
    assert len(gone) == 2 and net.block.conv1.weight[gone].all()  # half of what goes at the end
    assert not torch.equal(net.block.conv1.weight, weight)  # weights train
    train(net, algo, 1, first=2)
    assert net.block.bn1.weight.all()
    train(net, algo, 3, first=3)
    assert not algo.selecting
    gone = (net.block.bn1.weight == 0).nonzero().flatten()
    assert len(gone) == 4 and not net.block.bn1.bias[gone].any()
    assert not net.block.conv1.weight[gone].any() and not net.block.conv2.weight[:, gone].any()


def test_a_layer_without_a_norm_grows_from_its_weights():
    net = mlp()
    nn.init.constant_(net[0].bias, 0.5)
    algo = UniPrune(rate=0.4, round_to=8, select_steps=2, every=1, scope="layer", rules=[("0", {"rate": 0.9})])
    algo.apply(net, torch.randn(4, 16))
    algo.step()
    gone = ~net[0].weight.any(1)
    assert gone.sum() >= 8 and net[0].bias.all() and net[2].weight[:, gone].all()
    net(torch.randn(64, 16)).square().sum().backward()
    assert net[0].weight.grad[gone].any(1).all()


@pytest.mark.parametrize(
    "build, x, options",
    [
        (small, images(), {"rate": 0.4, "round_to": 2}),
        (small, images(), {"budget": "60% flops", "round_to": 1}),
        (small, images(), {"budget": "70% params", "round_to": 2, "scope": "layer"}),
        (vit, images(), {"budget": "60% flops", "round_to": 16}),
        (vit, images(), {"budget": "80% params", "round_to": 32, "rules": [("re:.*qkv", None)]}),
    ],
)
def test_the_cut_network_equals_the_masked_one(build, x, options, tmp_path):
    net = build()
    algo = UniPrune(select_steps=2, every=1, **options)
    net = algo.apply(net, x)
    train(net, algo, 4)
    want = evaluated(net, x)
    numbers = sum(p.numel() for p in net.parameters())
    net = algo.convert(net)
    got = evaluated(net, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in net.parameters()) < numbers
    gs_algos.save(net, tmp_path / "cut")
    assert torch.equal(evaluated(gs_algos.load(tmp_path / "cut", build), x), got)


def test_widths_are_multiples_and_floor_blocks_stay():
    net = vit()
    algo = UniPrune(rate=0.9, round_to=16, floor=2, select_steps=0, rules=[("re:.*qkv", None)])
    plan = algo.plan(net, images())
    reasons = {row.site: row.reason for row in plan.rows}
    assert "a rule leaves blocks.0.attention.qkv whole" in reasons["blocks.0.attention.qkv"]
    net = algo.convert(algo.apply(net, images()))
    assert [block.mlp[0].out_features for block in net.blocks] == [32, 32]


def test_a_layer_of_one_block_stays_whole_and_the_plan_says_so():
    reasons = {row.site: row.reason for row in UniPrune(round_to=8).plan(small(), images()).rows}
    assert reasons["block.conv1"] == "all 8 units stay at this rate, in multiples of 8 channels"
    with pytest.raises(ValueError, match=r"UniPrune\.apply: at least one group must lose a unit, got none"):
        UniPrune(round_to=8).apply(net := small(), images())
    assert not gs_algos.history(net)
    reasons = {row.site: row.reason for row in UniPrune(round_to=4, floor=2).plan(small(), images()).rows}
    assert reasons["block.conv1"].endswith("in multiples of 4 channels, of which 2 always stay")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    net = small()
    algo = UniPrune(rate=0.4, round_to=2, select_steps=4, every=2)
    net = algo.apply(net, images())
    train(net, algo, 3)
    gs_algos.save(net, tmp_path / "middle")
    train(net, algo, 3, first=3)
    other = gs_algos.load(tmp_path / "middle", small)
    again = UniPrune.resume(other)
    train(other, again, 3, first=3)
    assert torch.equal(evaluated(other, images()), evaluated(net, images()))
    assert torch.equal(evaluated(again.convert(other, images()), images()), evaluated(algo.convert(net), images()))


def test_a_pruned_network_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    algo = UniPrune(budget="50% params", round_to=4, select_steps=60, every=10)
    algo.apply(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(120):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        algo.step()
    whole = sum(p.numel() for p in net.parameters())
    net = algo.convert(net)
    assert (evaluated(net, x).argmax(1) == y).float().mean() > 0.95
    assert sum(p.numel() for p in net.parameters()) <= 0.5 * whole


def test_quantized_after_it_in_a_pipeline(tmp_path):
    def work(net: nn.Module, stage) -> None:
        train(net, stage.algorithm, 3)

    stages = [UniPrune(rate=0.4, round_to=2, select_steps=2, every=1), SimQAT()]
    net = Pipeline(stages, tmp_path / "stages").run(small(), images(), work)
    loaded = gs_algos.load(tmp_path / "stages" / "2-simqat", small)
    assert torch.equal(evaluated(loaded, images()), evaluated(net, images()))
    assert [entry["algorithm"] for entry in gs_algos.history(net)] == ["uniprune", "simqat"]


def test_a_search_finds_its_rates():
    algo = UniPrune(round_to=2, select_steps=2, every=1)
    policy = search_rules(
        small(), images(), algo, [images(seed=9)], budget="60% macs", evaluations=8, choices=(0.0, 0.5)
    )
    (found,) = policy.algorithms()
    assert found.config.rules and isinstance(found, UniPrune)
    whole, net = sum(p.numel() for p in small().parameters()), found.apply(small(), images())
    train(net, found, 2)
    net = found.convert(net)
    halves = {site for site, options in found.config.rules if options["rate"] == 0.5}
    assert halves and (net.block.conv1.out_channels == 4) == ("block.conv1" in halves)
    assert sum(p.numel() for p in net.parameters()) < whole


@pytest.mark.parametrize(
    "options, words",
    [
        ({"every": 0}, r"UniPrune: every must be a whole number >= 1, got 0"),
        ({"floor": 0}, r"UniPrune: floor must be a whole number >= 1, got 0"),
        ({"round_to": 0}, r"UniPrune: round_to must be a whole number >= 1, got 0"),
        ({"scope": "network"}, r"UniPrune: scope must be layer or global"),
        ({"budget": "half"}, r"budget: must be what may remain, as a percentage"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        UniPrune(**options)


def test_a_budget_that_blocks_cannot_meet_is_refused():
    net = small()
    before = copy.deepcopy(net.state_dict())
    algo = UniPrune(budget="5% flops", round_to=4)
    for call in (algo.plan, algo.apply):
        with pytest.raises(
            ValueError, match=r"must be one that the network can meet, got 5% flops; the least .* is \d"
        ):
            call(net, images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_weights_that_are_not_numbers_are_refused():
    net = small()
    algo = UniPrune(rate=0.4, round_to=2, select_steps=3, every=1)
    algo.apply(net, images())
    with torch.no_grad():
        net.block.conv1.weight[3] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"UniPrune: weights must be finite .* got nan or inf in block\.conv1; lower"
    ):
        algo.step()


def test_a_converted_network_has_nothing_left_to_cut():
    algo = SimQAT()
    net = algo.apply(mlp(), torch.randn(4, 16))
    net.train()(torch.randn(4, 16))
    net = algo.convert(net.eval())
    with pytest.raises(
        ValueError, match=r"(?s)UniPrune\.apply: at least one group must lose a unit, got none.*is packed"
    ):
        UniPrune(round_to=4).apply(net, torch.randn(4, 16))
