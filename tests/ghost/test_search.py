"""Searches for ghost ratios: what they cost, and rules that give just that."""

from __future__ import annotations

import copy

import pytest
import torch

from gs_algos import Ghost, SimQAT, search_rules
from gs_algos.analysis.operations import count_operations
from tests.ghost.test_ghost import images, net


@pytest.mark.parametrize("budget", ["75% params", "75% macs", "80% bytes"])
def test_the_network_of_the_rules_takes_what_the_search_says(budget):
    float_net = net()
    policy = search_rules(float_net, images(), Ghost(force=True), [images(1), images(2)], budget=budget, evaluations=4)
    kind = budget.split()[1]
    model = policy.algorithms()[0].apply(copy.deepcopy(float_net), images())
    if kind == "macs":
        assert policy.costs[kind] == count_operations(model, images(), "test").macs
    else:
        numbers = sum(p.numel() for p in model.parameters())
        assert policy.costs[kind] == numbers * (4 if kind == "bytes" else 1)
    assert policy.costs[kind] <= policy.limits[kind]
    assert {"a", "b"} == set(policy.setting["ghost ratio"])


def test_choices_and_partners_are_checked():
    model, data = net(), [images(1)]
    with pytest.raises(ValueError, match="ratio must be a whole number >= 2"):
        search_rules(model, images(), Ghost(force=True), data, choices=("ghost x",), budget="75% params")
    with pytest.raises(ValueError, match="ghost must be searched alone"):
        search_rules(model, images(), [Ghost(force=True), SimQAT()], data, budget="75% params")
    with pytest.raises(ValueError, match="a budget of latency must be for knobs of weights and inputs"):
        search_rules(model, images(), Ghost(force=True), data, budget="9 ms")


def test_a_search_leaves_the_network_as_it_was():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    search_rules(model, images(), Ghost(force=True), [images(1)], choices=("ghost 2", "float"), budget="90% params")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
