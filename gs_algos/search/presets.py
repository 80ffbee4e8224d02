"""Searches under the names of the papers that asked the questions, with the strong default for an agent.

`haq`: bits of weights and activations, Wang et al. 2019, arXiv:1811.08886. `amc`: prune rates, He et al. 2018,
arXiv:1802.03494. `nas`: widths of layers. Any option of `SearchConfig` may be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gs_algos.core.algorithm import Algorithm
from gs_algos.pruning.prune import Prune
from gs_algos.search.config import SearchConfig
from gs_algos.search.stage import Search


@dataclass(frozen=True)
class HAQConfig(SearchConfig):
    """Options of HAQ: those of `SearchConfig`, for weights and activations of 2 to 8 bits."""

    choices: tuple[str | float, ...] = ("int2@channel", "int4@channel", "int8@channel")
    acts: tuple[str, ...] = ("int2@tensor:ema", "int4@tensor:ema", "int8@tensor:ema")

    who: ClassVar[str] = "HAQ"


class HAQ(Search):
    """Finds the bits of each layer's weight and input, and trains the network with them by SimQAT."""

    name: ClassVar[str] = "haq"
    config_class: ClassVar[type[SearchConfig]] = HAQConfig


@dataclass(frozen=True)
class AMCConfig(SearchConfig):
    """Options of AMC: those of `SearchConfig`, for rates up to 0.8."""

    choices: tuple[str | float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    budget: str = "50% macs"

    who: ClassVar[str] = "AMC"


class AMC(Search):
    """Finds the share of its channels that each layer loses, the weakest by their norms, in multiples of 8.

    What reads them is refitted by least squares before a policy is scored; `reconstruct` does it to what was found.
    """

    name: ClassVar[str] = "amc"
    config_class: ClassVar[type[SearchConfig]] = AMCConfig

    @classmethod
    def usual(cls) -> Algorithm:
        return Prune(importance="l2", round_to=8, reconstruct=True)


@dataclass(frozen=True)
class NASConfig(SearchConfig):
    """Options of NAS: those of `SearchConfig`, for widths in eighths of the network's own."""

    choices: tuple[str | float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    budget: str = "50% macs"
    agent: str = "evolution"

    who: ClassVar[str] = "NAS"


class NAS(Search):
    """Finds the width of each layer."""

    name: ClassVar[str] = "nas"
    config_class: ClassVar[type[SearchConfig]] = NASConfig

    @classmethod
    def usual(cls) -> Algorithm:
        return Prune(importance="l2")
