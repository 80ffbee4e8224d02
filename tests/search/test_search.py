"""A search gives rules that fit the budget, from the choices that the plans and the user's rules leave."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gs_algos import PTQ, Prune, SimQAT, sensitivity
from gs_algos.analysis.operations import count_operations
from gs_algos.search.agent import AGENTS, Evaluated
from gs_algos.search.evaluate import ProbeScore
from gs_algos.search.problem import Problem
from gs_algos.search.repair import repair
from gs_algos.search.space import Picks
from gs_algos.search.target import Target
from tests.helpers import Untouched
from tests.search.nets import data, found, images, net


def bytes_after(algorithm, model) -> int:
    """What the algorithm's own plan says."""
    totals = algorithm.plan(model, images()).totals
    assert totals is not None
    return totals.after


@pytest.mark.parametrize("agent", ["ilp", "evolution", "random"])
def test_the_plan_of_the_found_algorithm_has_the_bytes_that_the_search_counted(agent):
    policy = found(budget="16% bytes", agent=agent, evaluations=20)
    (algorithm,) = policy.algorithms()
    assert policy.costs["bytes"] == bytes_after(algorithm, net()) <= policy.limits["bytes"]


def test_the_network_is_left_as_it_was():
    model = net()
    before = Untouched(model)
    found(model=model, budget="16% bytes", evaluations=4)
    assert before


def test_the_first_and_the_last_layer_get_8_bits_unless_a_rule_says_otherwise():
    (algorithm,) = found(
        SimQAT(weight="int4@channel", act=None, rules=[("0", {"weight": "int2@channel"})])
    ).algorithms()
    weights = {row.site: row.settings.weight for row in algorithm.plan(net(), images()).acted()}
    assert weights["0"].startswith("int2") and weights["16"].startswith("int8")


def test_ilp_finds_the_least_sum_of_scores_of_all_policies():
    policy = found(budget="3 bits", evaluations=1)
    sites = [site for site in policy.setting["weight"] if site not in ("0", "16")]
    scores = scores_of(sites)
    numbers = sum(net().get_submodule(site).weight.numel() for site in sites)
    best = min(
        sum(scores[s][c] for s, c in zip(sites, chosen, strict=True))
        for chosen in itertools.product(*(scores[s] for s in sites))
        if packed(sites, chosen) <= 3 * numbers / 8
    )
    assert policy.predicted == pytest.approx(best)


def scores_of(sites) -> dict[str, dict[str, float]]:
    return {s: dict(own) for s, own in sensitivity(net(), data(), by="kl").scores.items() if s in sites}


def packed(sites, chosen) -> int:
    """Codes, and a scale of 4 bytes for each output."""
    weights = [net().get_submodule(site).weight for site in sites]
    return sum(w.numel() * int(c[3]) // 8 + 4 * len(w) for w, c in zip(weights, chosen, strict=True))


def test_multiply_adds_of_a_pruned_network_are_those_of_the_cut_one():
    policy = found(Prune(importance="l2", round_to=4), budget="50% macs", evaluations=6)
    (algorithm,) = policy.algorithms()
    cut = algorithm.convert(algorithm.apply(net(), images()), images())
    assert count_operations(cut, images(), "test").macs == policy.costs["macs"] <= 0.5 * policy.before["macs"]


def test_rates_and_bits_are_searched_together():
    policy = found([Prune(importance="l2"), SimQAT(act=None)], budget="8% bytes", evaluations=4)
    prune, quantize = policy.algorithms()
    cut = prune.convert(prune.apply(net(), images()), images())
    assert bytes_after(quantize, cut) == policy.costs["bytes"] <= policy.limits["bytes"]


def test_weights_that_ptq_rounds_are_searched():
    (algorithm,) = found(PTQ(weight="int4@channel"), budget="16% bytes", evaluations=2).algorithms()
    assert bytes_after(algorithm, net()) <= 0.16 * sum(p.numel() * 4 for p in net().parameters())


def test_bits_of_inputs_are_searched():
    policy = found(SimQAT(), acts=("int4@tensor", "int8@tensor"), budget="5% bops", evaluations=4)
    assert {value.partition("@")[0] for value in policy.setting["act"].values()} == {"int4", "int8"}


def test_two_budgets_are_kept():
    policy = found(SimQAT(), acts=("int2@tensor", "int8@tensor"), budget="16% bytes, 2% bops", evaluations=4)
    assert all(policy.costs[kind] <= policy.limits[kind] for kind in ("bytes", "bops"))


def test_the_users_function_scores_policies():
    seen = []

    def evaluate(network):
        seen.append(torch.stack([p.abs().sum() for p in network.parameters()]).sum().item())
        return seen[-1]

    policy = found(evaluate=evaluate, budget="16% bytes", evaluations=8)
    assert policy.score == max(seen[1:]) and policy.baseline == seen[0]


def test_tune_trains_what_the_algorithm_prepared():
    trained = []

    def tune(network, algorithm):
        trained.append(len(algorithm.config.rules))
        network.train()
        network(images(4))
        algorithm.step()

    found(tune=tune, evaluate=lambda network: float(network(images(4)).sum()), budget="16% bytes", evaluations=3)
    assert len(trained) >= 1 and min(trained) >= 1


def test_another_budget_needs_no_new_scores():
    first = found(budget="16% bytes", evaluations=2)
    second = first.within("14% bytes")
    assert second.costs["bytes"] <= second.limits["bytes"] < first.costs["bytes"] and second.evaluated <= 1


def test_the_front_is_cheaper_or_better_point_by_point():
    policy = found(budget="16% bytes", agent="random", evaluations=20)
    assert len(policy.front) > 1
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(policy.front))
    assert all(a.cost < b.cost and a.predicted >= b.predicted for a, b in itertools.pairwise(policy.curve))


def test_more_evaluations_are_never_worse():
    few, many = (found(budget="16% bytes", agent="evolution", evaluations=n, seed=3) for n in (20, 60))
    assert many.score >= few.score


class Most:
    """Proposes once what leaves most of the network."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.left = problem, [problem.most]
        self.found: list[Evaluated] = []

    def propose(self) -> list[Picks]:
        return [self.left.pop()] if self.left else []

    def observe(self, found: Sequence[Evaluated]) -> None:
        self.found += found
        SEEN.append(self)


SEEN: list[Most] = []


def test_an_agent_is_one_line_and_what_it_proposes_is_made_to_fit(monkeypatch):
    monkeypatch.setitem(AGENTS, "most", f"{Most.__module__}:Most")
    monkeypatch.setitem(sys.modules, Most.__module__, sys.modules[Most.__module__])
    policy = found(budget="16% bytes", agent="most")
    (agent,) = SEEN
    (one,) = agent.found
    assert one.proposed == agent.problem.most and agent.problem.fits(one.picks) and one.score == policy.score
    assert repair(agent.problem, agent.problem.most) == one.picks == repair(agent.problem, one.picks)


def test_a_policy_is_scored_after_what_reads_pruned_channels_is_refitted():
    model = net()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"budget": "60% macs", "evaluations": 3}
    refitted, masked = (found(Prune(reconstruct=flag), model, **options) for flag in (True, False))
    assert refitted.score > masked.score and refitted.predicted < masked.predicted
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_refitting_for_a_score_leaves_no_trace():
    model = net()
    target = Target.of(0, Prune(reconstruct=True), model, images(), "test")
    score = ProbeScore([target], model, data(), None, "test")
    half, most = ({"rate": {"0": rate, "6": rate}} for rate in (0.5, 0.75))
    first = score(half)
    assert score(most) < first == score(half)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in score.probe.network.state_dict().items())


def test_pruned_networks_are_scored_with_the_batch_norm_statistics_that_they_have():
    policy = found(Prune(importance="l2"), budget="50% macs", evaluations=1)
    (algorithm,) = policy.algorithms()
    model = algorithm.apply(net(), images())
    algorithm.refresh(model, data())
    float_logits, logits = (torch.cat([n.eval()(x) for x in data()]).log_softmax(1) for n in (net(), model))
    kl = (float_logits.exp() * (float_logits - logits)).sum(1).mean().item()
    assert -policy.score == pytest.approx(kl, rel=1e-3)
