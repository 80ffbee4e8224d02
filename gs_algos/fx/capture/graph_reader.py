"""Reads the fx graph of a tracer: each operation becomes a draft of a node, with canonical op and live modules' names.

torch.export and torch.fx.symbolic_trace both leave an fx graph with `nn_module_stack` in each node's meta; what differs
between them (lifted parameters, higher-order regions, leaf calls) ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_arg

from gs_algos.core.modules import canonical_names, get_module, parameter_owners, parent_name
from gs_algos.fx import op_names


@dataclass
class NodeDraft:
    """Holds a node under construction; its inputs are positions in the list of drafts."""

    op: str
    inputs: list[int]
    target: str
    scope: str = ""
    call: tuple[str, ...] | None = None  # tells two calls of one module apart; None for input and output
    module: str | None = None
    weight: str | None = None
    reads: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None


class Edge(int):
    """Marks an int among an op's arguments as the index of a draft."""


@dataclass(frozen=True)
class Constant:
    """Stands for an argument that no node computes: the parameter `name`, or (None) a buffer or a constant."""

    name: str | None = None


class ModuleNames:
    """Maps names in a trace to canonical names in the live model. prefix: name of the traced module."""

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self.model = model
        self.prefix = prefix
        self.modules = canonical_names(model)
        self.owners = parameter_owners(model)

    def scope(self, path: str) -> str:
        return self.modules[id(get_module(self.model, join(self.prefix, path)))]

    def parameter(self, path: str) -> str | None:
        """Returns the canonical name of the parameter at a path; None for a buffer or a plain tensor attribute."""
        return self.own(join(self.prefix, parent_name(path)), path.rpartition(".")[2])

    def own(self, scope: str, key: str) -> str | None:
        """Returns the first name of the parameter `key` of the live module `scope`; tied parameters have several."""
        found = get_module(self.model, scope)._parameters.get(key)
        return None if found is None else self.owners[id(found)][0]

    def weight_of(self, scope: str) -> str | None:
        """Returns the name of a live module's weight under that module, tied or not."""
        found = get_module(self.model, scope)._parameters.get("weight")
        return None if found is None else join(scope, "weight")


def join(*parts: str) -> str:
    """Joins parts of a qualified name, leaving out empty ones."""
    return ".".join(part for part in parts if part)


class FxGraphReader:
    """Turns one fx graph into `drafts`. strip: the wrapper's attribute that holds the traced module, if any."""

    def __init__(self, names: ModuleNames, strip: str = "") -> None:
        self.names = names
        self.strip = strip
        self.drafts: list[NodeDraft] = []

    def read(self, graph: torch.fx.Graph, owner: nn.Module, constants: dict[str, Constant]) -> list[NodeDraft]:
        """Reads a whole graph. constants: placeholder name -> parameter or buffer, where it is not an input."""

        def placeholder(node: torch.fx.Node) -> Any:
            return constants.get(node.name) or self._add(NodeDraft("input", [], node.name))

        result = self._region(graph, owner, placeholder)
        self._add(NodeDraft("output", list(_drafts(result)), "output"))
        return self.drafts

    def _add(self, draft: NodeDraft) -> Edge:
        self.drafts.append(draft)
        return Edge(len(self.drafts) - 1)

    def _region(self, graph: torch.fx.Graph, owner: nn.Module, placeholder: Callable[[torch.fx.Node], Any]) -> Any:
        """Reads a graph or the body of a higher-order region; returns what it returns."""
        env: dict[torch.fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = placeholder(node)
            elif node.op == "get_attr":
                env[node] = self._attribute(str(node.target), owner)
            elif node.op == "output":
                return map_arg(node.args[0], env.__getitem__)
            else:
                args, kwargs = map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__)
                env[node] = self._operation(node, args, kwargs)
        return None

    def _attribute(self, target: str, owner: nn.Module) -> Any:
        value: Any = owner
        for part in target.split("."):
            value = getattr(value, part)
        if isinstance(value, torch.fx.GraphModule):
            return value  # the body of a higher-order region
        return Constant(self.names.parameter(self._live(target)) if isinstance(value, nn.Parameter) else None)

    def _live(self, path: str) -> str:
        return path.removeprefix(self.strip).removeprefix(".") if self.strip else path

    def _operation(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        name = op_names.bare_name(node.target)
        if name == "getitem" and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        bodies = [i for i, arg in enumerate(args) if isinstance(arg, torch.fx.GraphModule)]
        if len(bodies) == 1:  # a region under autocast or a grad mode: runs once, so it is read in place
            rest = iter(args[bodies[0] + 1 :])
            return self._region(args[bodies[0]].graph, args[bodies[0]], lambda _: next(rest))
        if name in op_names.DROPPED:
            return Constant()
        draft = self._draft(node, name, args, kwargs)
        looked_through = draft.op in op_names.NOOPS or (name in op_names.CASTS and _same_type(node))
        return args[0] if looked_through and args else self._add(draft)

    def _draft(self, node: torch.fx.Node, name: str, args: Any, kwargs: Any) -> NodeDraft:
        stack = node.meta.get("nn_module_stack") or {}
        scope = self.names.scope(self._live([path for path, _ in stack.values()][-1] if stack else self.strip))
        draft = NodeDraft("other", list(_drafts((args, kwargs))), str(node.target), scope, tuple(stack))
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            draft.shape = tuple(int(size) for size in value.shape)
        if node.op == "call_module":
            path = self._live(str(node.target))
            self._leaf(draft, get_module(self.names.model, join(self.names.prefix, path)))
            return draft
        draft.op = op_names.op_of_call(name, args, kwargs)
        if draft.op == "add" and len(draft.inputs) != 2:
            draft.op = "other"  # a scalar or a parameter is added: nothing to share a scale with
        draft.reads = tuple(found.name for found in _flat((args, kwargs)) if isinstance(found, Constant) and found.name)
        if draft.op in op_names.WEIGHTED:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            draft.weight = weight.name if isinstance(weight, Constant) else None
        return draft

    def _leaf(self, draft: NodeDraft, module: nn.Module) -> None:
        """Fills the draft of a call that the tracer did not look into, from the module's class."""
        draft.scope = self.names.modules[id(module)]
        draft.op = op_names.op_of_module(module)
        if op_names.is_plain(module) or draft.op == "other":
            draft.module = draft.scope
        draft.reads = tuple(self.names.owners[id(found)][0] for found in module.parameters())
        draft.weight = self.names.weight_of(draft.scope)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _drafts(value: Any) -> Iterator[int]:
    """Yields the indices of the drafts in the arguments of a call, in order."""
    return (int(found) for found in _flat(value) if isinstance(found, Edge))


def _same_type(node: torch.fx.Node) -> bool:
    source = next(iter(node.all_input_nodes), None)
    before, after = (source.meta.get("val") if source else None), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
