"""The algorithms by name. A new one is one file and one line here."""

from __future__ import annotations

import importlib

from gs_algos.core.algorithm import Algorithm, Restores
from gs_algos.core.rules import did_you_mean

ALGORITHMS = {
    "prune": "gs_algos.pruning.prune:Prune",
    "scop": "gs_algos.pruning.scop:SCOP",
    "simqat": "gs_algos.qat.simqat:SimQAT",
    "slb": "gs_algos.qat.slb:SLB",
}
# functions that leave an entry in a model's history: `load` must know how to restore it, and nothing else
FUNCTIONS = {
    "quantize_weights": "gs_algos.ptq.weights:QuantizedWeights",
}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of an algorithm.

    Raises:
        ValueError: if there is no algorithm of that name.
    """
    if name not in ALGORITHMS:
        near = did_you_mean(name, ALGORITHMS)
        raise ValueError(f"algorithm: name must be one of {', '.join(ALGORITHMS)}, got {name!r}{near}")
    module, _, cls = ALGORITHMS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def restorer(name: str) -> type[Restores]:
    """The class that restores what an entry of a model's history did.

    Raises:
        ValueError: if there is no algorithm or function of that name.
    """
    if name not in FUNCTIONS:
        return algorithm_class(name)
    module, _, cls = FUNCTIONS[name].partition(":")
    return getattr(importlib.import_module(module), cls)
