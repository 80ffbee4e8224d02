"""Reads a compression run from a file: TOML, YAML or JSON, checked key by key before anything is built.

```toml
model = "resnet56"            # what `golden-stick demo --model` takes
data = "fashion-mnist"
float_epochs = 20

[[stage]]
algorithm = "scop"
epochs = 8
select_epochs = 2             # of these, with still weights: SCOP's first phase
options = { rate = 0.45, round_to = 8 }

[[stage]]
algorithm = "simqat"
epochs = 4
options = { weight = "int8@channel", rules = [["fc", "none"]] }

[stage.distill]               # of the stage above: the float network teaches it
temperature = 4.0

[stage.search]                # finds more rules, for the other layers
budget = "3 bits"
```
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from gs_algos.core.algorithm import Algorithm, inner_of
from gs_algos.core.arguments import as_path, as_seed
from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.core.registry import algorithm_class
from gs_algos.distill.distill import Distill
from gs_algos.qat.training import QuantizationTraining
from gs_algos.search.stage import Search

T = TypeVar("T")
TEACHER = ("teacher", "weights")  # of another network than the recipe's, in `StageRecipe.distill`
NONE = "none"  # TOML has no null: this word stands for it in options


@dataclass(frozen=True)
class StageRecipe:
    """Describes one algorithm and its training.

    Args:
        algorithm: a name of gs_algos.core.registry.
        epochs: of training, all phases together.
        options: of the algorithm; the word "none" is None.
        select_epochs: of these epochs, those before a pruning algorithm decides; default: its own choice.
        lr: largest learning rate; default: the one the network is usually tuned with.
        distill: options of `Distill`, which then wraps the algorithm; the teacher is the float network that the recipe
            begins with, or a network named `teacher`, as `Recipe.model`, with its safetensors file `weights`.
        search: options of `SearchConfig`, to find rules of the algorithm before it is trained; None: no search.
    """

    algorithm: str
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    select_epochs: int | None = None
    lr: float | None = None
    distill: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {self.epochs}")
        given = [key for key in TEACHER if key in (self.distill or {})]
        if given and (len(given) < len(TEACHER) or not all(isinstance(self.distill[key], str) for key in given)):  # type: ignore[index]
            raise ValueError(f"distill: {' and '.join(TEACHER)} must be two texts, got {given[0]} alone, or no text")
        if self.select_epochs is not None and not 0 < self.select_epochs <= self.epochs:
            raise ValueError(f"select_epochs must be in 1..epochs, got {self.select_epochs} of {self.epochs}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be finite and > 0, got {self.lr}")


@dataclass(frozen=True)
class Recipe:
    """Describes a network, data, and the stages that compress it.

    Args:
        model: name of a built-in network, or `package.module:function` that builds one.
        data: name of a data set, with `:folder` where it needs one, or `package.module:function` that gives one.
        stage: in order.
        float_epochs: of training from random weights; 0 if `weights` is given.
        weights: safetensors file with the float network's tensors.
        image_size: side to which imagefolder resizes.
        synthetic: steps of a generator of images, which the stages are trained on in place of the training set; 0: on
            that set.
    """

    model: str
    data: str
    stage: tuple[StageRecipe, ...]
    float_epochs: int = 20
    weights: str | None = None
    batch_size: int | None = None
    image_size: int = 64
    seed: int = 0
    synthetic: int = 0

    def __post_init__(self) -> None:
        if self.synthetic < 0:
            raise ValueError(f"synthetic must be >= 0 steps, got {self.synthetic}")
        if not self.stage:
            raise ValueError("stage must be at least one table, got none; write [[stage]]")
        if self.float_epochs < 0:
            raise ValueError(f"float_epochs must be >= 0, got {self.float_epochs}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be >= 1, got {self.image_size}")
        as_seed(self.seed, "seed")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads the recipe in a .toml, .yaml, .yml or .json file.

    Raises:
        ValueError: if the file cannot be read, a key is unknown, missing or of another type, or an algorithm refuses
            its options.
    """
    file = as_path(path, "recipe: the file")
    try:
        data = _reader(file)(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"recipe: {file} must be a readable {file.suffix} file, got one nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe: {file} must be a readable {file.suffix or 'text'} file, got {error}") from error
    recipe = typed(Recipe, data, str(file))
    for number, stage in enumerate(recipe.stage, 1):
        try:
            _check_options(stage, inner_of(make_algorithm(stage, 1)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"recipe: {file}: stage {number}: {error}") from error
    algorithms = [inner_of(make_algorithm(stage, 1)) for stage in recipe.stage]
    names = [algorithm.name for algorithm in algorithms]
    quantizers = [one.name for one in algorithms if isinstance(one, QuantizationTraining)]
    twice = [name for name in quantizers if quantizers.count(name) > 1]
    if twice:
        raise ValueError(
            f"recipe: {file}: {twice[0]} must be in one stage, since it quantizes what is float, got it in "
            f"{names.count(twice[0])}"
        )
    return recipe


def _check_options(stage: StageRecipe, algorithm: Algorithm) -> None:
    """Raises ValueError if a stage cannot be trained as it says, which it would show after the stages before it."""
    config: Any = algorithm.active().config
    if stage.epochs == 0 and algorithm.trains and getattr(config, "select_steps", False):
        raise ValueError(f"epochs must be >= 1 for {stage.algorithm}, which has to learn what to cut, got 0")
    for rule in getattr(config, "rules", ()):
        pair = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)
        if not pair or not (rule[1] is None or isinstance(rule[1], str | Mapping)):
            raise ValueError(f"every rule must be [pattern, options], such as ['fc', 'none'], got {rule!r:.60}")
    if getattr(config, "fused", False):
        raise ValueError(f"{stage.algorithm}: fused needs an optimizer of its own, got fused=true; leave it out")


def make_algorithm(stage: StageRecipe, steps_per_epoch: int, teacher: nn.Module | None = None) -> Algorithm:
    """Makes the algorithm of a stage, told how long its training is.

    teacher: of a stage that is distilled.

    Raises:
        ValueError: if the name is unknown, or an option has a wrong value.
        TypeError: if an option is unknown.
    """
    cls: Any = algorithm_class(stage.algorithm)
    options = {**cls.training_options(stage.epochs, steps_per_epoch), **_without_none(stage.options)}
    if stage.select_epochs is not None:
        options["select_steps"] = stage.select_epochs * steps_per_epoch
    algorithm: Algorithm = cls(**options)
    if stage.search is not None:
        algorithm = Search(algorithm, **_without_none(stage.search))
    if stage.distill is None:
        return algorithm
    own = {key: value for key, value in _without_none(stage.distill).items() if key not in TEACHER}
    return Distill(algorithm, teacher, **own)


def typed(cls: type[T], data: Any, where: str) -> T:
    """Makes a dataclass from plain values: every key known, every value of the annotated type.

    Raises:
        ValueError: in words a writer of the file understands; `where` is the file, and the table in it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe: {where} must be a table of keys and values, got {type(data).__name__}")
    hints, by_name = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in by_name:
            near = did_you_mean(str(key), by_name)
            raise ValueError(f"recipe: {where} has {', '.join(by_name)}, got {key}{near}")
    lacking = [n for n, f in by_name.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if lacking:
        raise ValueError(
            f"recipe: {where} must have {', '.join(lacking)}, got {', '.join(map(str, data)) or 'nothing'}"
        )
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"recipe: {where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to its annotation: a class, `X | None`, `tuple[Dataclass, ...]`, or `dict[str, Any]`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"recipe: {where} must be a list of tables, got {value!r}; write [[stage]]")
        return tuple(typed(arguments[0], item, f"{where} {i}") for i, item in enumerate(value, 1))
    kind = origin or hint
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if not fits and not (kind is float and type(value) is int):
        raise ValueError(f"recipe: {where} must be {kind.__name__}, got {value!r}")
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return None if value == NONE else value


def _reader(file: Path) -> Callable[[bytes], Any]:
    """Returns the parser for a file's suffix. Every error it raises is a ValueError."""
    if file.suffix == ".json":
        return lambda data: json.loads(data, object_pairs_hook=_object)
    if file.suffix == ".toml":
        return lambda data: _toml().loads(data.decode())
    if file.suffix in (".yaml", ".yml"):
        return _yaml
    raise ValueError(f"a name that ends in {file.suffix or 'nothing'}; use .toml, .yaml or .json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object, and refuses a key that is there twice: one value would be lost in silence."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} twice")
    return dict(pairs)


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise ValueError("TOML needs the package tomli before Python 3.11; pip install tomli") from error
    return tomli


def _yaml(data: bytes) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs the package pyyaml; pip install pyyaml, or write TOML") from error
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
