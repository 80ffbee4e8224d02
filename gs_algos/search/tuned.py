"""Scores policies by the real algorithms, after a short training of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from gs_algos.core.algorithm import Algorithm, Inputs, evaluating
from gs_algos.search.evaluate import Evaluate
from gs_algos.search.space import Setting

Tune: TypeAlias = Callable[[nn.Module, Algorithm], None]  # trains a network that an algorithm has prepared


class TunedScore:
    """Applies the algorithms to a copy of the network, with the rules of a setting, and has each tuned.

    What comes before the last one is converted; the last one's network is scored as it was trained.

    Args:
        algorithms_of: gives new algorithms with the rules of a setting.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        algorithms_of: Callable[[Setting], Sequence[Algorithm]],
        tune: Tune,
        evaluate: Evaluate,
    ) -> None:
        self.network, self.inputs, self.algorithms_of = network, inputs, algorithms_of
        self.tune, self.evaluate = tune, evaluate

    def __call__(self, setting: Setting) -> float:
        net = copy.deepcopy(self.network)
        algorithms = self.algorithms_of(setting) if any(setting.values()) else []
        for number, algorithm in enumerate(algorithms, 1):
            net = algorithm.apply(net, self.inputs)
            self.tune(net, algorithm)
            if number < len(algorithms):
                net = algorithm.convert(net, self.inputs)
        with evaluating(net):
            return float(self.evaluate(net))
