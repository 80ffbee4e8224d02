"""Proposes random picks: the control of every comparison."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gs_algos.search.agent import Evaluated
from gs_algos.search.problem import Problem
from gs_algos.search.space import Picks

AT_ONCE = 16


class RandomPicks:
    """Draws each knob's value uniformly."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.generator = problem, random.Random(problem.seed)

    def propose(self) -> list[Picks]:
        return [drawn(self.problem, self.generator) for _ in range(AT_ONCE)]

    def observe(self, found: Sequence[Evaluated]) -> None:
        pass


def drawn(problem: Problem, generator: random.Random) -> Picks:
    """Draws picks."""
    return tuple(generator.randrange(len(knob.values)) for knob in problem.knobs)
