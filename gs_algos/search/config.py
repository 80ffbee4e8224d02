"""Defines the options of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from gs_algos.core.arguments import as_seed
from gs_algos.core.config import AlgorithmConfig
from gs_algos.search.agent import refuse_unknown
from gs_algos.search.budget import Budget

SCORES = ("auto", "kl", "gradient", "nsr")


@dataclass(frozen=True)
class SearchConfig(AlgorithmConfig):
    """Options of a search.

    Args:
        choices: schemes of weights, such as `int4@channel` or `float`, prune rates, and ratios of ghosts, such as
            `ghost 2`; of a kind that none is of, the usual ones: 2, 4 and 8 bits, rates from 0 to 0.75, and ratios of
            2 and 4 beside the layer as it is.
        acts: schemes of what layers read, such as `int4@tensor`; none leaves them to the algorithm.
        budget: what the network may take: `40% bytes`, `params`, `macs`, `bops` or `latency` of the float network's;
            `3 bits` a weight that has a choice, scales included; `80 MB` or `12 ms`. Or two of them, with a comma.
        agent: `ilp` solves for the least sum of the scores of single choices; `evolution` breeds; `ddpg` learns, as
            AMC and HAQ do; `random` is the control. See `gs_algos.search.agent`.
        evaluations: of whole policies, at most.
        score: of single choices: `kl`, `gradient` or `nsr` as in `gs_algos.sensitivity`; `auto` is `kl`, and `gradient`
            from 100 layers on.
        seed: of all that is random.
    """

    choices: tuple[str | float, ...] = ()
    acts: tuple[str, ...] = ()
    budget: str = "40% bytes"
    agent: str = "ilp"
    evaluations: int = 200
    score: str = "auto"
    seed: int = 0

    who: ClassVar[str] = "Search"

    def __post_init__(self) -> None:
        Budget.parse_all(self.budget, self.who)
        refuse_unknown(self.agent, self.who)
        if type(self.evaluations) is not int or self.evaluations < 1:
            raise ValueError(f"{self.who}: evaluations must be a whole number >= 1, got {self.evaluations!r}")
        if self.score not in SCORES:
            raise ValueError(f"{self.who}: score must be one of {', '.join(SCORES)}, got {self.score!r}")
        for name in ("choices", "acts"):
            value = getattr(self, name)
            if isinstance(value, str | float | int):
                raise TypeError(f"{self.who}: {name} must be a list, got {value!r}; use [{value!r}]")
            object.__setattr__(self, name, tuple(value))
        as_seed(self.seed, f"{self.who}: seed")


class SearchOptions(TypedDict, total=False):
    """Types the fields of `SearchConfig` as keywords, for type checkers."""

    choices: tuple[str | float, ...]
    acts: tuple[str, ...]
    budget: str
    agent: str
    evaluations: int
    score: str
    seed: int
