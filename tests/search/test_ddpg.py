"""DDPG as an agent: it learns a problem whose answer is known, the same each time, by the papers' arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import Prune
from gs_algos.search.agent import Evaluated
from gs_algos.search.ddpg import AMC, DDPG, HAQ, action_of, pick_of, truncated_normal
from gs_algos.search.problem import Limit, Problem
from gs_algos.search.random_picks import RandomPicks
from gs_algos.search.repair import repair
from gs_algos.search.space import Knob, Picks, Setting, Space
from tests.search.nets import found

BEST = (1, 1, 1, 2, 2, 2, 2, 1, 1, 1)  # as much as the budget allows


class SumOfPicks:
    """Costs of a network: the sum of its values."""

    def total(self, kind: str, setting: Setting) -> float:
        return 1.0 + sum(float(value) for own in setting.values() for value in own.values())


def problem(evaluations: int, kind: str = "weight", seed: int = 0, most: int = sum(BEST)) -> Problem:
    """Ten layers with values 0 to 3, whose sum must be at most that of `BEST`."""
    knobs = tuple(Knob(str(i), kind, (0.0, 1.0, 2.0, 3.0)) for i in range(len(BEST)))
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in BEST))
    limits, costs = (Limit("bytes", 1.0 + most, "toy"),), SumOfPicks()
    return Problem(Space(knobs, {}, ()), limits, costs, dict, evaluations, seed, network, {})  # type: ignore[arg-type]


def score_of(picks: Picks) -> float:
    return -float(sum(abs(pick - best) for pick, best in zip(picks, BEST, strict=True)))


def run(agent: Any, toy: Problem) -> list[Evaluated]:
    """What the driver does."""
    seen: list[Evaluated] = []
    while len(seen) < toy.evaluations:
        proposed = agent.propose()[: toy.evaluations - len(seen)]
        legal = [repair(toy, picks) for picks in proposed]
        batch = [Evaluated(p, picks, score_of(picks)) for p, picks in zip(proposed, legal, strict=True)]
        seen += batch
        agent.observe(batch)
    return seen


def test_it_learns_better_picks_than_random_ones_of_equal_number():
    toy = problem(60)
    learned, control = (run(agent(toy), toy) for agent in (DDPG, RandomPicks))
    assert max(one.score for one in learned) > max(one.score for one in control)
    ends = [sum(one.score for one in seen[-20:]) / 20 for seen in (learned, control)]
    assert ends[0] > 0.6 * ends[1]  # scores are at most 0


def test_the_same_seed_proposes_the_same():
    toy, again, other = (problem(6, seed=seed) for seed in (0, 0, 1))
    runs = [[one.proposed for one in run(DDPG(one), one)] for one in (toy, again, other)]
    assert runs[0] == runs[1] != runs[2]


def test_random_state_of_the_program_is_left_alone():
    toy = problem(4)
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    run(DDPG(toy), toy)
    assert torch.equal(torch.rand(3), want)


def test_what_it_proposes_meets_the_budget_by_itself():
    toy = problem(12)
    assert all(toy.fits(one.proposed) for one in run(DDPG(toy), toy))


@pytest.mark.parametrize("kind, first, decay", [("weight", 20, 0.99), ("act", 20, 0.99), ("rate", 100, 0.95)])
def test_walks_at_the_start_and_noise_are_those_of_the_papers(kind, first, decay):
    settings = AMC if kind == "rate" else HAQ
    agent = DDPG(problem(settings.random + settings.learned, kind))
    assert (len(agent.propose()), agent.decay) == (first, decay)
    assert len(DDPG(problem(60, kind)).propose()) == (2 if kind != "rate" else 8)


def test_actions_are_rounded_as_haq_rounds():
    low, high = 2, 8  # bits
    for action in torch.linspace(0.001, 0.999, 200).tolist():
        assert low + pick_of(action, high - low + 1) == round((high - low + 1) * action + low - 0.5)
    assert (pick_of(0.0, 4), pick_of(1.0, 4)) == (0, 3)


def test_an_action_stands_for_the_pick_that_was_evaluated():
    assert action_of(0.3, 1, 4) == 0.3
    assert action_of(0.9, 1, 4) == 0.375


def test_noise_is_a_truncated_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([truncated_normal(0.8, 0.5, generator) for _ in range(4000)])
    assert drawn.amin() >= 0 and drawn.amax() <= 1

    def density(x: float) -> float:
        return math.exp(-((x - 0.8) ** 2) / (2 * 0.25))

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - 0.8) / (0.5 * math.sqrt(2))))

    mean = 0.8 - 0.25 * (density(1) - density(0)) / (0.5 * math.sqrt(2 * math.pi) * (below(1) - below(0)))
    assert abs(float(drawn.mean()) - mean) < 0.02


@pytest.mark.parametrize("algorithm", [None, "prune"])
def test_a_killed_search_goes_on_to_the_same_policy(algorithm, tmp_path):
    path = tmp_path / "journal"
    given = None if algorithm is None else Prune(importance="l2")
    options: dict[str, Any] = {"agent": "ddpg", "evaluations": 10, "journal": path}
    options["budget"] = "30% bytes" if algorithm is None else "50% macs"
    whole = found(given, **options)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:5])  # half a line too
    assert found(given, **options).rules == whole.rules
    assert path.read_bytes().count(b"\n") == len(lines)
