"""The algorithms by name. A new one is one file and one line here."""

from __future__ import annotations

import importlib

from gs_algos.core.algorithm import Algorithm
from gs_algos.core.rules import did_you_mean

ALGORITHMS = {
    "simqat": "gs_algos.qat.simqat:SimQAT",
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
