"""Checks the example inputs of an export, and gives them the names and sizes that the file keeps."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, history, run, split_inputs
from gs_algos.core.arguments import as_path, refuse_file_above, refuse_unwritable
from gs_algos.core.network import network_of
from gs_algos.quant.fake_quant.quantizers import Quantizer
from gs_kernels import UnsupportedError
from gs_kernels.runtime.torch_private import MappingKey, SequenceKey, tree_flatten_with_path, tree_leaves, tree_map_only

TAKEN = "a tensor, a tuple of tensors for its positional inputs, or a dict of tensors by name"


@dataclass(frozen=True)
class Example:
    """Holds one call of a network.

    Args:
        args, kwargs: tensors, or None where the network takes None.
        names: of all that are tensors, in the order of args, then kwargs; "x" if it is one without a name.
        outputs: names of the tensors that come out; "y" if it is one.
        dynamic_shapes: for torch.export: an input with as many rows as the first one has may have any number of them.
    """

    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Tensor | None]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors in the order of `names`."""
        return tuple(t for t in (*self.args, *self.kwargs.values()) if t is not None)


def new_file(path: str | os.PathLike[str], suffix: str, who: str) -> Path:
    """Checks that an export may be written to the path, and returns it.

    Raises:
        ValueError: if it does not end in `suffix`, something is there, or its folder is none.
        PermissionError: if its folder cannot be written to.
    """
    target = as_path(path, f"{who}: the target")
    if target.suffix != suffix or os.path.lexists(target):
        there = "a folder that is there" if target.is_dir() else "a file that is there"
        got = there if os.path.lexists(target) else target.name
        raise ValueError(f"{who}: the target must be a new file that ends in {suffix}, got {got}; choose another name")
    refuse_file_above(target, f"{who}: the target")
    refuse_unwritable(target, f"{who}: the target")
    return target


def exportable(model: nn.Module, example: Inputs, who: str) -> tuple[nn.Module, Example]:
    """Returns the network and the call of it that an export traces.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it is still prepared for training, the example is not of tensors with a batch of at least 2, or
            does not run through the network.
    """
    network = network_of(model, who)
    for name, module in network.named_modules():
        stages = history(module)
        if isinstance(module, Quantizer) or (stages and stages[-1]["stage"] == "prepared"):
            got = f"one that {stages[-1]['algorithm']} prepared" if stages else "one with layers that are prepared"
            at = f" at {name}" if name and stages else ""
            raise ValueError(
                f"{who}: the model must be converted or float, got {got} for training{at}; convert it first"
            )
    args, kwargs = _tensors(example, who)
    with evaluating(network):
        y = run(network, example, who)
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    names = tuple(_named_tensors(bound)) if len(args) != 1 or kwargs else ("x",)
    return network, Example(args, kwargs, names, _outputs(y, names, who), _dynamic_shapes(bound))


@contextmanager
def read_by_torch(who: str) -> Iterator[None]:
    """Turns what torch.export says of a network that it cannot read into one line.

    Raises:
        UnsupportedError: with that line.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
        raise UnsupportedError(
            f"{who}: torch.export must be able to read the network for any batch, got {type(cause).__name__}: "
            f"{lines[0]:.300}; branches on values and sizes that are written out are what it often stops at"
        ) from error


def _tensors(example: Any, who: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise ValueError(f"{who}: example must be {TAKEN}, got {type(example).__name__}")
    args, kwargs = split_inputs(example)
    values = [*args, *kwargs.values()]
    others = sorted({type(v).__name__ for v in values if v is not None and not isinstance(v, Tensor)})
    if others or all(v is None for v in values):
        got = f"a {type(example).__name__} with {', '.join(others) or 'nothing'}"
        raise ValueError(f"{who}: example must be {TAKEN}, got {got}; wrap the network in a module that takes tensors")
    first = next(v for v in values if v is not None)
    if first.dim() < (2 if len(values) == 1 else 1) or first.shape[0] < 2:
        raise ValueError(f"{who}: example must have a batch of at least 2, got {list(first.shape)}")
    return args, kwargs


def _named_tensors(bound: inspect.BoundArguments) -> Iterator[str]:
    """Names the inputs that are tensors; those of *args are numbered."""
    for name, value in bound.arguments.items():
        if isinstance(value, tuple):
            yield from (f"{name}{i}" for i, t in enumerate(value) if t is not None)
        elif isinstance(value, dict):
            yield from (key for key, t in value.items() if t is not None)
        elif value is not None:
            yield name


def _dynamic_shapes(bound: inspect.BoundArguments) -> dict[str, Any]:
    given = [t for t in tree_leaves(bound.arguments) if t is not None]
    batch, rows = torch.export.Dim("batch"), given[0].shape[0]

    def sizes(t: Tensor) -> dict[int, Any] | None:
        return {0: batch} if t.dim() > 0 and t.shape[0] == rows else None

    return dict(tree_map_only(Tensor, sizes, dict(bound.arguments)))


def _outputs(y: Any, taken: tuple[str, ...], who: str) -> tuple[str, ...]:
    if isinstance(y, Tensor):
        return ("y" if "y" not in taken else "y_out",)
    names = []
    for path, value in tree_flatten_with_path(y)[0]:
        if isinstance(value, Tensor):
            name = "_".join(f"y{key.idx}" if isinstance(key, SequenceKey) else _word(key) for key in path)
            names.append(f"{name}_out" if name in taken else name)
    if not names:
        raise ValueError(f"{who}: the model must give tensors, got {type(y).__name__}")
    return tuple(names)


def _word(key: Any) -> str:
    return str(key.key) if isinstance(key, MappingKey) else str(getattr(key, "name", key))
