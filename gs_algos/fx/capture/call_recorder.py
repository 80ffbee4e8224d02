"""Runs a model and records the calls of chosen modules, and the functions outside of them that read parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gs_algos.core.modules import parent_name
from gs_algos.fx import op_names
from gs_algos.fx.capture.graph_reader import ModuleNames, NodeDraft
from gs_kernels.runtime.torch_private import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """Holds one call of a module with the arguments it got."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: ModuleNames,
    is_unit: Callable[[nn.Module], bool],
) -> list[Call | NodeDraft]:
    """Runs `module` on copies of its inputs and lists, in order, the outermost calls of units inside it.

    Functions that read a parameter outside every unit come as drafts without edges.
    """
    calls: list[Call | NodeDraft] = []
    depth = 0

    def enter(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        if depth == 0:
            calls.append(Call(unit, *copied((args, kwargs), module)))
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    units = [
        child for child in module.modules() if child is not module and is_unit(child) and op_names.is_hookable(child)
    ]
    handles = [unit.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for unit in units]
    handles += [unit.register_forward_hook(leave) for unit in units]
    try:
        with _ParameterReads(names, lambda draft: None if depth else calls.append(draft)):
            args, kwargs = copied((args, kwargs), module)
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def first_calls(
    modules: dict[str, nn.Module], root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Call]:
    """Runs `root` on copies of its inputs, and returns the first call of each module that is called, by its name."""
    calls: dict[str, Call] = {}
    handles = []
    for name, module in modules.items():

        def enter(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            if name not in calls:
                calls[name] = Call(unit, *copied((args, kwargs), root))

        if op_names.is_hookable(module):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
    try:
        args, kwargs = copied((args, kwargs), root)
        root(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def leaf_draft(module: nn.Module, names: ModuleNames) -> NodeDraft:
    """Makes the draft of a module's call without edges, when nothing but the class is known."""
    name = names.modules[id(module)]
    op = op_names.op_of_module(module)
    reads = tuple(names.owners[id(found)][0] for found in module.parameters())
    is_leaf = op_names.is_plain(module) or op == "other"
    weight = names.weight_of(name)
    return NodeDraft(op, [], type(module).__name__, name, None, name if is_leaf else None, weight, reads)


class _ParameterReads(TorchFunctionMode):
    """Reports every torch function that is given a parameter of the model."""

    def __init__(self, names: ModuleNames, report: Callable[[NodeDraft], None]) -> None:
        super().__init__()
        self.names = names
        self.report = report

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op_names.bare_name(func)
        owners = self.names.owners
        reads = tuple(owners[id(leaf)][0] for leaf in tree_leaves((args, kwargs)) if id(leaf) in owners)
        if reads and not name.startswith("__"):  # properties such as .shape come as `__get__`
            op = op_names.op_of_call(name, args, kwargs)
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            used = owners[id(weight)][0] if op in op_names.WEIGHTED and id(weight) in owners else None
            # which module calls the function is not known: the owner of the parameter stands in
            self.report(NodeDraft(op, [], name, parent_name(used or reads[0]), weight=used, reads=reads))
        return func(*args, **kwargs)


def copied(arguments: Any, model: nn.Module) -> Any:
    """Copies the arguments of a call: a forward may write into tensors, and grow a key-value cache.

    The model's own parameters and modules stay the same objects. What cannot be copied is passed on as it is.
    """
    memo: dict[int, Any] = {id(own): own for own in (*model.parameters(), *model.buffers(), *model.modules())}
    try:
        return copy.deepcopy(arguments, memo)
    except Exception:  # noqa: BLE001  any class may refuse, for any reason
        return tree_map(_clone, arguments)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
