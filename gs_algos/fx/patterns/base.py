"""Defines matches and refusals of patterns, and the guards that decide between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from torch.nn.utils import parametrize

from gs_algos.core.modules import get_module, parameter_owners
from gs_algos.fx import op_names
from gs_algos.fx.graph import Node, SiteGraph


@dataclass(frozen=True)
class Match:
    """Describes a place where a pattern holds and every guard passed."""

    pattern: str
    roles: dict[str, str]  # role -> qualified module name, e.g. {"conv": "conv1", "bn": "bn1"}; a function is "F.relu"
    nodes: tuple[int, ...]
    operands: tuple[str | None, ...] = ()  # of add and cat: the module that produces each operand; None: no such module
    norm_children: tuple[str, ...] = ()  # modules in the batch norm that run behind it: folding keeps them


@dataclass(frozen=True)
class Refusal:
    """Describes a place where a pattern would hold but for one guard. site: a module, a parameter, or else a scope."""

    pattern: str
    site: str
    reason: str


@dataclass
class View:
    """Holds a site graph, its live model, and the facts about both that guards ask for, computed once."""

    graph: SiteGraph
    model: nn.Module
    owners: dict[int, tuple[str, ...]] = field(init=False)
    calls: Counter[str] = field(init=False)  # leaf module -> how often it ran
    readers: dict[str, list[Node]] = field(init=False)  # parameter (first name) -> nodes that read it

    def __post_init__(self) -> None:
        self.owners = parameter_owners(self.model)
        self.calls = Counter(node.module for node in self.graph.nodes if node.module is not None)
        self.readers = {}
        for node in self.graph.nodes:
            for name in node.reads:
                self.readers.setdefault(name, []).append(node)

    def module(self, node: Node) -> nn.Module:
        assert node.module is not None
        return get_module(self.model, node.module)

    def learned(self, node: Node) -> bool:
        """Says whether the weight of a functional conv or linear depends on a parameter; a fixed filter does not."""
        stack, seen = list(node.inputs[1:]), set[int]()
        while stack:
            source = self.graph.nodes[stack.pop()]
            if source.reads:
                return True
            if source.index not in seen:
                seen.add(source.index)
                stack += source.inputs
        return bool(node.reads)

    def matrices(self, node: Node) -> list[str]:
        """Lists the parameters of two or more axes that a product reads, itself or through values made of them."""
        found, stack = dict.fromkeys(node.reads), [i for i in node.inputs if i not in self._active]
        while stack:
            source = self.graph.nodes[stack.pop()]
            found.update(dict.fromkeys(source.reads))
            stack += source.inputs
        return [name for name in found if self.model.get_parameter(name).dim() > 1]

    @cached_property
    def _active(self) -> set[int]:
        """Returns the indices of the nodes whose output depends on an input of the model."""
        active = set[int]()
        for node in self.graph.nodes:
            if node.op == "input" or not active.isdisjoint(node.inputs):
                active.add(node.index)
        return active

    def foreign_readers(self, module: str) -> list[Node]:
        """Lists the nodes that read a parameter of this module but are not a call of it."""
        own = get_module(self.model, module)._parameters.values()
        first = [self.owners[id(parameter)][0] for parameter in own if parameter is not None]
        return [node for name in first for node in self.readers.get(name, []) if node.module != module]

    @staticmethod
    def describe(node: Node) -> str:
        return f"{node.target} in {node.scope!r}" if node.scope else f"{node.target} in the root"

    def only_user(self, node: Node) -> Node | None:
        """Returns the one node that reads this output; None if there are several, none, or it leaves the graph."""
        if len(node.users) != 1:
            return None
        user = self.graph.nodes[node.users[0]]
        return None if user.op == "output" else user


def refuse_calls(view: View, node: Node) -> str | None:
    """Refuses a module that does not run exactly once: one fold would have to serve two places."""
    n = view.calls[node.module or ""]
    return None if n == 1 else f"called {n} times in one forward pass"


def refuse_parameters(view: View, node: Node) -> str | None:
    """Refuses parameters that are not plain, not the module's own, or read by something else too."""
    module = view.module(node)
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is re-parametrized"  # type: ignore[arg-type]
    if "weight" in module.__dict__ or (hasattr(module, "weight") and "weight" not in module._parameters):
        return "weight is computed by a hook (weight_norm, spectral_norm), not a parameter"
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        names = view.owners[id(parameter)]
        others = [name for name in names if name != f"{node.module}.{key}"]
        if others:
            return f"{key} is tied to {', '.join(others)}"
    foreign = view.foreign_readers(node.module or "")
    return f"its parameters are also read by {view.describe(foreign[0])}" if foreign else None


def refuse_hooks(view: View, node: Node) -> str | None:
    """Refuses hooks on a module: they would see other values, or vanish with it."""
    module = view.module(node)
    return "has forward hooks, which would see other values" if module._forward_hooks else None


def refuse_pre_hooks(view: View, node: Node) -> str | None:
    """Refuses pre-hooks on a module: they change what it reads, which a fold would leave out."""
    return "has forward pre-hooks, which may change what it reads" if view.module(node)._forward_pre_hooks else None


def site_of(view: View, node: Node) -> tuple[str, str]:
    """Returns (site, reason) for a conv or linear that no module runs as a whole."""
    scope = get_module(view.model, node.scope)
    if type(scope).__module__.startswith("torch.nn."):
        owner_name, _, _ = (node.weight or "").rpartition(".")
        layered = owner_name != node.scope and isinstance(get_module(view.model, owner_name), op_names.SITES)
        reason = f"its weight is used inside {type(scope).__name__}, not by a module of its own"
        return (owner_name if layered else node.weight or node.scope), reason
    if isinstance(scope, op_names.SITES):
        what = "computes its weight or does more than its class says"
        return node.scope, f"{type(scope).__name__} has a forward of its own, which {what}"
    if node.weight is None:
        made = view.matrices(node)
        site = made[0] if made else node.scope
        return site, f"functional {node.op} with a computed weight in {type(scope).__name__}"
    owner_name, _, _ = node.weight.rpartition(".")
    owner = get_module(view.model, owner_name)
    if isinstance(owner, op_names.SITES):
        return (
            owner_name,
            f"its weight is used by a function in {node.scope or 'the root'!r}, not by the module",
        )
    return (
        node.weight,
        f"functional {node.op} on a parameter; gs_algos.fx.modularize turns it into a module",
    )
