"""Breeds picks: the best of those that were tried are crossed and changed at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gs_algos.search.agent import Evaluated
from gs_algos.search.ilp import first_picks
from gs_algos.search.problem import Problem
from gs_algos.search.random_picks import drawn
from gs_algos.search.repair import repair
from gs_algos.search.space import Picks

POPULATION = 20
PARENTS = 10
MUTATION = 0.1  # probability that a knob is drawn anew
TRIES = 20  # of a child that was not tried before


class Evolution:
    """Keeps 20 picks and breeds 20 from the best 10 by uniform crossover; the first ones are random.

    seeded: whether the solution of `ilp` is among the first.
    """

    seeded = True

    def __init__(self, problem: Problem) -> None:
        self.problem, self.generator = problem, random.Random(problem.seed)
        self.population: list[Evaluated] = []
        self.known: set[Picks] = set()

    def propose(self) -> list[Picks]:
        if self.population:
            children = [self._child() for _ in range(POPULATION)]
        else:
            start = first_picks(self.problem)[:1] if self.seeded else []
            children = [*start, *(drawn(self.problem, self.generator) for _ in range(POPULATION - len(start)))]
        self.known.update(children)
        return children

    def observe(self, found: Sequence[Evaluated]) -> None:
        self.known.update(one.picks for one in found)
        alive = {one.picks: one for one in (*self.population, *found)}
        self.population = sorted(alive.values(), key=lambda one: (-one.score, one.picks))[:POPULATION]

    def _child(self) -> Picks:
        parents = self.population[:PARENTS]
        for _ in range(TRIES):
            first, second = self.generator.choice(parents).picks, self.generator.choice(parents).picks
            other = drawn(self.problem, self.generator)
            bred = tuple(
                new if self.generator.random() < MUTATION else a if self.generator.random() < 0.5 else b
                for a, b, new in zip(first, second, other, strict=True)
            )
            child = repair(self.problem, bred)
            if child not in self.known:
                break
        return child


class Unseeded(Evolution):
    """Starts from random picks alone."""

    seeded = False
