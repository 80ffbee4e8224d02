"""Lets an agent search: repairs what it proposes, has it evaluated, counts, and tells it the scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

from gs_algos.search.agent import Agent, Evaluated
from gs_algos.search.evaluate import Evaluations
from gs_algos.search.problem import Problem
from gs_algos.search.repair import repair
from gs_algos.search.space import Picks

logger = logging.getLogger(__name__)

OnStep: TypeAlias = Callable[[int, int, float], None]  # proposals so far, at most, best score


def drive(
    agent: Agent, problem: Problem, evaluations: Evaluations, on_step: OnStep | None = None
) -> dict[Picks, Evaluated]:
    """Runs an agent until it proposes nothing more, or has proposed `problem.evaluations` picks.

    A proposal counts whether it was evaluated before or not, so that agents are compared at equal numbers and every
    search ends.

    Returns:
        What was evaluated, each picks once, in the order of their first proposal.
    """
    found: dict[Picks, Evaluated] = {}
    count, best = 0, -float("inf")
    while count < problem.evaluations:
        proposed = list(agent.propose())[: problem.evaluations - count]
        if not proposed:
            break
        batch = _evaluated(proposed, problem, evaluations)
        count += len(batch)
        for one in batch:
            found.setdefault(one.picks, one)
            if one.score > best:
                best = one.score
                logger.info("search: %d of %d, best score %.6g", count, problem.evaluations, best)
        agent.observe(batch)
        if on_step is not None:
            on_step(count, problem.evaluations, best)
    return found


def _evaluated(proposed: Sequence[Picks], problem: Problem, evaluations: Evaluations) -> list[Evaluated]:
    legal = [repair(problem, picks) for picks in proposed]
    scores = evaluations([problem.space.setting(picks) for picks in legal])
    return [Evaluated(p, picks, score) for p, picks, score in zip(proposed, legal, scores, strict=True)]
