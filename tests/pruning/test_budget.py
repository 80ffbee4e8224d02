"""How many units stay: rates, rounding, rules and budgets, and what is said when a budget cannot be met."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from gs_algos import Prune
from gs_algos.demo.models import build
from gs_algos.pruning import planning
from gs_algos.pruning.budget import keep_globally, latency_cost
from gs_algos.pruning.channel_groups.find import find_groups
from tests.nets.convolutional import SmallConvNet, images


def layers(*widths: int) -> nn.Module:
    """Linear layers of these output widths behind 8 inputs."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((8, *widths))))


def left(net: nn.Module, x: torch.Tensor, **options) -> list[int]:
    """Output features of every layer after pruning."""
    algo = Prune(**options)
    algo.convert(algo.apply(net, x))
    return [m.weight.shape[0] for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options, want",
    [
        ({"rate": 0.45}, [11, 18, 5]),  # 20 - 9, 32 - 14: never more than the rate
        ({"rate": 0.45, "round_to": 8}, [16, 24, 5]),
        ({"rate": 0.99}, [1, 1, 5]),
        ({"rate": 0.9, "round_to": 16}, [16, 16, 5]),
        ({"rate": 0.5, "rules": [("1", None)]}, [10, 32, 5]),
        ({"rate": 0.5, "rules": [("1", {"rate": 0.25})]}, [10, 24, 5]),
        ({"rate": 0, "rules": [("re:[01]", {"rate": 0.75}), ("0", {"rate": 0.05})]}, [19, 8, 5]),
        ({"budget": "50% channels"}, [10, 16, 5]),
        ({"budget": "50% channels", "rules": [("0", {"rate": 0.1})]}, [18, 8, 5]),
    ],
)
def test_channels_that_stay(options, want):
    assert left(layers(20, 32, 5), X, **options) == want


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget", ["60% params", "60% flops", "55% channels"])
def test_a_budget_is_met_and_not_undercut_by_more_than_a_step(budget, scope):
    torch.manual_seed(0)
    net = build("resnet20", in_channels=1, num_classes=10, image_size=8)
    x = torch.randn(2, 1, 8, 8)
    groups = find_groups(net, x)
    whole = {"params": sum(p.numel() for p in net.parameters()), "flops": groups.macs(groups.everything())}
    whole["channels"] = sum(g.n * len(g.layers) for g in groups.prunable())
    algo = Prune(budget=budget, scope=scope, importance="random")
    net = algo.convert(algo.apply(net, x))
    after = find_groups(net, x, prove=False)
    found = {"params": sum(p.numel() for p in net.parameters()), "flops": after.macs(after.everything())}
    found["channels"] = sum(g.n * len(g.layers) for g in after.prunable())
    percent, kind = float(budget[:2]), budget.split()[1]
    assert percent - 4 < 100 * found[kind] / whole[kind] <= percent


def test_global_pruning_takes_the_lowest_of_all_but_never_a_whole_group():
    net = layers(4, 6, 3)
    groups = find_groups(net, X)
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4, 5, 5.5])
    keep = keep_globally(groups, scores, {"0": None, "1": None}, 0.6, 1)
    assert keep.tolist() == [True] * 3 + [False] + [False] * 5 + [True]  # six of ten, the best of the second stays
    keep = keep_globally(groups, scores, {"0": 0.0, "1": None}, 0.6, 2)
    assert keep.tolist() == [True] * 4 + [False, False, True, True, True, True]  # three go, one comes back
    keep = keep_globally(groups, scores, {"0": None, "1": None}, 0.999, 1)
    assert keep.nonzero().flatten().tolist() == [0, 9]


def test_rounding_counts_the_channels_of_coupled_layers():
    net = build("vit-tiny", in_channels=1, num_classes=10, image_size=8)
    algo = Prune(rate=0.4, round_to=16)
    rows = {row.site: row for row in algo.plan(net, torch.randn(2, 1, 8, 8)).rows}
    assert rows["blocks.0.attention.qkv"].action == "prune 1 of 3"  # a head is 192 channels of qkv, a multiple of 16
    assert rows["blocks.0.mlp.0"].action == "prune 304 of 768"  # 768 - 307 = 461, up to 464


def test_a_budget_that_cannot_be_met_says_the_least_that_can():
    with pytest.raises(ValueError, match=r"got 2% params; the least that can remain is 2\.1% params"):
        Prune(budget="2% params").plan(layers(20, 32, 5), X)  # (8 + 1) + (1 + 1) + (5 + 5) of 1,017


def test_a_latency_budget_is_measured(monkeypatch):
    def cost(model, groups, inputs):
        return lambda keep: 40 + 60 * float(keep.float().mean())  # a machine on which half the time is overhead

    monkeypatch.setattr(planning, "latency_cost", cost)
    assert left(layers(20, 40, 5), X, budget="70% latency") == [10, 20, 5]
    with pytest.raises(ValueError, match=r"the least that can remain is 42\.0% latency"):
        Prune(budget="41% latency").plan(layers(20, 40, 5), X)


def test_latency_is_that_of_the_cut_network():
    net, x = layers(1024, 1024, 5), torch.randn(64, 8)
    groups = find_groups(net, x)
    cost = latency_cost(net, groups, x)
    few = groups.everything()
    few[8:1024] = few[1032:] = False
    assert cost(few) < 60 and cost(groups.everything()) == 100 and net[0].out_features == 1024


def test_a_rule_on_one_layer_keeps_what_is_coupled_with_it():
    plan = Prune(rules=[("block.project", None)]).plan(SmallConvNet(), images())
    row = next(row for row in plan.rows if row.site == "block.conv2")
    assert (row.action, row.reason) == ("keep", "a rule leaves block.project.0 whole")
    with pytest.raises(ValueError, match=r"every rule must match a layer, got steem .* did you mean stem"):
        Prune(rules=[("steem", None)]).plan(SmallConvNet(), images())


def test_a_plan_lists_every_group():
    plan = Prune(rate=0.5, importance="bn").plan(nn.Sequential(*SmallConvNet().children())[:2], images())
    assert [(row.site, row.action, row.reason) for row in plan.rows] == [("0", "keep", "is an output of the network")]
    plan = Prune(rate=0.5, importance="bn").plan(layers(6, 2), X)
    assert plan.rows[0].reason == "has no batch norm whose scale could rank it"
    assert "prune: 0 of 2 layers" in str(plan)
