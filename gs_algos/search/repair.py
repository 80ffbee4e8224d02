"""Makes any picks fit the limits: one way for all agents, so that they differ in what they propose alone."""

from __future__ import annotations

import random

from gs_algos.search.problem import Problem, with_pick
from gs_algos.search.space import Picks


def repair(problem: Problem, picks: Picks) -> Picks:
    """Lowers random knobs by one value until the picks fit, then raises knobs in random order while they do.

    The same picks become the same ones whenever and in whichever process they are repaired.
    """
    generator = random.Random(f"{problem.seed} {picks}")
    return raised(problem, lowered(problem, picks, generator), generator)


def lowered(problem: Problem, picks: Picks, generator: random.Random) -> Picks:
    """Lowers random knobs until all limits are kept; picks that fit already stay as they are."""
    while not problem.fits(picks):
        excess = problem.excess(picks)
        kind = problem.limits[excess.index(max(excess))].kind
        before = problem.total(picks, kind)
        places = [place for place, pick in enumerate(picks) if pick]
        generator.shuffle(places)
        lower = (with_pick(picks, place, picks[place] - 1) for place in places)
        found = next((one for one in lower if problem.total(one, kind) < before), None)
        if found is None:
            assert problem.least_that_fits is not None
            return problem.least_that_fits
        picks = found
    return picks


def raised(problem: Problem, picks: Picks, generator: random.Random) -> Picks:
    """Raises knobs by one value, in turns, as long as one can be raised and all limits are kept."""
    places = list(range(len(picks)))
    generator.shuffle(places)
    while places:
        left = []
        for place in places:
            if picks[place] + 1 < len(problem.knobs[place].values):
                more = with_pick(picks, place, picks[place] + 1)
                if problem.fits(more):
                    picks = more
                    left.append(place)
        places = left
    return picks
