"""Finds algorithms by name: our own, those that `register_algorithm` was given, and those of installed packages.

A new one of ours is one file and one line here. Another package names its own in the entry point group
`gs_algos.algorithms`, from which they are imported when their name is first asked for:

```toml
[project.entry-points."gs_algos.algorithms"]
two-four = "acme.sparsity:TwoFour"  # a class whose `name` is "two-four"
```
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from gs_algos.core.algorithm import Algorithm, Restores
from gs_algos.core.did_you_mean import did_you_mean

ALGORITHMS = {
    "adder": "gs_algos.adder.adder:Adder",
    "amc": "gs_algos.search.presets:AMC",
    "ghost": "gs_algos.ghost.ghost:Ghost",
    "haq": "gs_algos.search.presets:HAQ",
    "heads": "gs_algos.pruning.heads:Heads",
    "nas": "gs_algos.search.presets:NAS",
    "prune": "gs_algos.pruning.prune:Prune",
    "ptq": "gs_algos.ptq.ptq:PTQ",
    "scop": "gs_algos.pruning.scop:SCOP",
    "search": "gs_algos.search.stage:Search",
    "simqat": "gs_algos.qat.simqat:SimQAT",
    "slb": "gs_algos.qat.slb.algorithm:SLB",
    "uniprune": "gs_algos.pruning.uniprune:UniPrune",
    "distill": "gs_algos.distill.distill:Distill",
}
# functions that leave an entry in a model's history: `load` must know how to restore it, and nothing else
FUNCTIONS = {
    "quantize_weights": "gs_algos.ptq.weights:QuantizedWeights",
}
GROUP = "gs_algos.algorithms"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it is part of the names of folders
Class = TypeVar("Class", bound=type[Algorithm])

logger = logging.getLogger(__name__)
_registered: dict[str, type[Algorithm]] = {}
_warned: set[tuple[str, str]] = set()  # (name, package) of entry points that a warning was about


class UnknownAlgorithmError(ValueError):
    """Says that no algorithm has a name."""


def register_algorithm(cls: Class) -> Class:
    """Makes an algorithm known by its `name` in this process, to `load`, recipes and pipelines. Also a decorator.

    The same class may be registered again, as a notebook does whose cell runs twice. A package names its algorithms in
    the entry point group `gs_algos.algorithms` instead, and need not be imported; a registered class goes before those.

    Raises:
        TypeError: if it is no class of an `Algorithm` that can be made.
        ValueError: if its name is taken, or cannot be that of a folder.
    """
    wrong = _why_none(cls)
    if wrong:
        raise TypeError(f"register_algorithm: it must be given {wrong}")
    name = cls.name
    if not NAME.fullmatch(name):
        raise ValueError(f"register_algorithm: {cls.__name__}.name must be letters, digits, - and _, got {name!r}")
    if name in {*ALGORITHMS, *FUNCTIONS}:
        raise ValueError(f"register_algorithm: {cls.__name__}.name must be free, got {name!r}, which is golden-stick's")
    old = _registered.get(name, cls)
    if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        by = f"{old.__module__}.{old.__qualname__}"
        raise ValueError(f"register_algorithm: {cls.__name__}.name must be free, got {name!r}, which is that of {by}")
    _registered[name] = cls
    return cls


def algorithm_names() -> tuple[str, ...]:
    """Returns the names of all algorithms. Imports none of them."""
    return tuple(dict.fromkeys([*ALGORITHMS, *_registered, *_plugins()]))


def algorithm_class(name: str) -> type[Algorithm]:
    """Imports and returns the class of an algorithm.

    Raises:
        UnknownAlgorithmError: a ValueError, if there is no algorithm of that name.
        ValueError: if the package that names it cannot be imported, or gives something that is no algorithm.
    """
    if name in _registered:
        return _registered[name]
    if name in ALGORITHMS:
        return _imported(ALGORITHMS[name])
    plugins = _plugins()
    if name in plugins:
        return _loaded(name, plugins[name])
    names = algorithm_names()
    near = did_you_mean(name, names)
    raise UnknownAlgorithmError(f"algorithm: name must be one of {', '.join(names)}, got {name!r}{near}")


def restorer(name: str) -> type[Restores]:
    """Imports and returns the class that restores what an entry of a model's history did.

    Raises:
        UnknownAlgorithmError: a ValueError, if there is no algorithm or function of that name.
        ValueError: as `algorithm_class`.
    """
    return _imported(FUNCTIONS[name]) if name in FUNCTIONS else algorithm_class(name)


def _imported(place: str) -> Any:
    module, _, cls = place.partition(":")
    return getattr(importlib.import_module(module), cls)


def _plugins() -> dict[str, list[EntryPoint]]:
    """Returns name -> the entry points of that name in other packages; more than one if packages disagree.

    An entry point whose name is taken counts for nothing, and a warning says so once.
    """
    plugins: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        why = f"{point.name!r} is one of golden-stick's own" if point.name in {*ALGORITHMS, *FUNCTIONS} else ""
        why = why or ("" if NAME.fullmatch(point.name) else f"{point.name!r} has more than letters, digits, - and _")
        if not why:
            others = plugins.setdefault(point.name, [])
            if point.value not in [other.value for other in others]:
                others.append(point)
        elif (point.name, _package(point)) not in _warned:
            _warned.add((point.name, _package(point)))
            logger.warning("algorithm: a package's name for one must be free, got %s, in %s", why, _package(point))
    return plugins


def _loaded(name: str, points: list[EntryPoint]) -> type[Algorithm]:
    if len(points) > 1:
        packages = " and ".join(sorted(map(_package, points)))
        raise ValueError(f"algorithm: {name!r} must be of one package, got {packages}; uninstall one of them")
    (point,) = points
    try:
        cls = point.load()
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"algorithm: {name!r} of the package {_package(point)} must be importable as {point.value}, got {told}; "
            "mend or uninstall that package"
        ) from error
    wrong = _why_none(cls)
    if not wrong and cls.name != name:
        wrong = f"a class whose name is {name!r}, got name={cls.name!r}"
    if wrong:
        raise ValueError(f"algorithm: {name!r} of the package {_package(point)}, {point.value}, must be {wrong}")
    return cls


def _package(point: EntryPoint) -> str:
    """Returns the package that has an entry point, and its version."""
    dist = point.dist
    return "?" if dist is None else f"{dist.name} {dist.version}"


def _why_none(cls: Any) -> str:
    """Says what an object that is no algorithm must be, and what it is; "" for the class of an algorithm."""
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        return f"a class that derives from gs_algos.Algorithm, got {cls!r:.60}"
    if inspect.isabstract(cls):
        lacking = ", ".join(sorted(cls.__abstractmethods__))
        return f"a class with every method of gs_algos.Algorithm, got {cls.__name__} without {lacking}"
    if not isinstance(getattr(cls, "name", None), str):
        return f"a class with a name, got {cls.__name__} without; write name = '{cls.__name__.lower()}' in it"
    return ""
