"""Defines what an agent is: it proposes picks, and is told what they scored. The driver repairs, evaluates and counts.

To add one, write a class with the methods of `Agent` in a file of its own, and its line in `AGENTS`:

```python
class Uniform:
    def __init__(self, problem: Problem) -> None:
        self.left = [tuple(min(i, m) for m in problem.most) for i in range(max(problem.most) + 1)]

    def propose(self) -> list[Picks]:
        return [self.left.pop()] if self.left else []

    def observe(self, found: Sequence[Evaluated]) -> None:
        pass
```

`problem` has the knobs with their values (`knobs`), the cost of any picks and whether they fit (`total`, `fits`), the
scores of single values (`scores`, `predicted`; measured when they are first asked for), how many policies may be
proposed (`evaluations`), the seed, and the float network with the calls of its layers, for what a state may tell.

An agent must propose the same after the same scores: draw what is random from a generator seeded by `problem.seed`. A
search that was killed proposes it all again, and is given the scores from the journal. What one call of `propose`
returns may be evaluated by several processes at once, so return as much as does not depend on each other, however many
processes there are.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.search.problem import Problem
from gs_algos.search.space import Picks

AGENTS = {
    "ddpg": "gs_algos.search.ddpg:DDPG",
    "evolution": "gs_algos.search.evolution:Evolution",
    "evolution-unseeded": "gs_algos.search.evolution:Unseeded",
    "ilp": "gs_algos.search.ilp:ILP",
    "random": "gs_algos.search.random_picks:RandomPicks",
}


@dataclass(frozen=True)
class Evaluated:
    """Says what a proposal became.

    Args:
        proposed: by the agent.
        picks: that were evaluated: those proposed, made to fit.
        score: the higher, the better; that of the float network is `problem.baseline`.
    """

    proposed: Picks
    picks: Picks
    score: float


class Agent(Protocol):
    """Proposes picks."""

    def __init__(self, problem: Problem) -> None: ...

    def propose(self) -> Sequence[Picks]:
        """Returns the next picks to try, which need not fit; none if there is nothing more to try."""
        ...

    def observe(self, found: Sequence[Evaluated]) -> None:
        """Is told what the last proposals became: all of them, or fewer of them at the end."""
        ...


def agent_class(name: str, who: str) -> type[Agent]:
    """Imports and returns the class of an agent.

    Raises:
        ValueError: if there is none of that name.
    """
    refuse_unknown(name, who)
    module, _, cls = AGENTS[name].partition(":")
    found: Any = getattr(importlib.import_module(module), cls)
    return found  # type: ignore[no-any-return]


def refuse_unknown(name: Any, who: str) -> None:
    if name not in AGENTS:
        near = did_you_mean(str(name), AGENTS)
        raise ValueError(f"{who}: agent must be one of {', '.join(AGENTS)}, got {name!r}{near}")
