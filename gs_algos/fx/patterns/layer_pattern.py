"""Matches a layer, then optionally a batch norm and an activation; conv_bn_act and linear_act are such patterns.

Two kinds of guards. One on the layer itself refuses the site. One on the batch norm refuses only the fold: the refusal
names the batch norm, and the layer is still a match, without the roles `bn` and `act`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from gs_algos.fx.graph import Node
from gs_algos.fx.op_names import ACTIVATIONS
from gs_algos.fx.patterns.base import (
    Match,
    Refusal,
    View,
    refuse_calls,
    refuse_hooks,
    refuse_parameters,
    refuse_pre_hooks,
    site_of,
)
from gs_kernels.runtime.torch_private import _NormBase

Guard = Callable[[View, Node], "str | None"]


@dataclass(frozen=True)
class LayerPattern:
    """Says which ops make up one pattern, and which guards refuse it."""

    name: str
    role: str  # what the layer is called in Match.roles
    layers: tuple[str, ...]  # ops
    refused: tuple[str, ...] = ()  # ops that belong to the pattern but are not supported
    acts: tuple[str, ...] = ACTIVATIONS
    guards: tuple[Guard, ...] = (refuse_calls, refuse_parameters)  # on the layer
    fold_guards: tuple[Guard, ...] = (
        refuse_calls,
        refuse_parameters,
        refuse_hooks,
        refuse_pre_hooks,
    )  # on the batch norm


def find(pattern: LayerPattern, view: View) -> Iterator[Match | Refusal]:
    """Finds every site of the pattern, each once, in execution order; then batch norms that cannot be folded."""
    seen: set[str] = set()
    for node in view.graph.nodes:
        if node.op not in (*pattern.layers, *pattern.refused) or (node.module is None and not view.learned(node)):
            continue
        site, reason = (node.module, None) if node.module is not None else site_of(view, node)
        if site in seen:
            continue
        seen.add(site)
        reason = reason or _refuse_layer(pattern, view, node)
        if reason:
            yield Refusal(pattern.name, site, reason)
        else:
            yield from _match(pattern, view, node)


def _refuse_layer(pattern: LayerPattern, view: View, node: Node) -> str | None:
    if node.module == "":
        return "the model itself is the layer; put it in a Sequential, so that it has a name"
    if node.op in pattern.refused:
        return f"{type(view.module(node)).__name__} is not supported yet"
    return next((reason for guard in pattern.guards if (reason := guard(view, node))), None)


def _match(pattern: LayerPattern, view: View, layer: Node) -> Iterator[Match | Refusal]:
    assert layer.module is not None
    roles, nodes = {pattern.role: layer.module}, [layer.index]
    norm_children: tuple[str, ...] = ()
    norms = [view.graph.nodes[i] for i in layer.users if view.graph.nodes[i].op == "batch_norm"]
    norms = [norm for norm in norms if norm.inputs[:1] == (layer.index,)]
    follower = view.only_user(layer)
    if norms:
        reason = _refuse_fold(pattern, view, layer, norms)
        if reason:
            for norm in norms:
                yield Refusal(pattern.name, norm.module or norm.scope, reason)
            yield Match(pattern.name, roles, tuple(nodes))
            return
        assert norms[0].module is not None
        roles["bn"] = norms[0].module
        behind = _behind(view, norms[0])
        nodes += [norms[0].index, *(node.index for node in behind)]
        norm_children = tuple(node.module or "" for node in behind)
        follower = behind[-1] if behind else view.only_user(norms[0])
    if follower is not None and follower.op in pattern.acts:
        roles["act"] = f"F.{follower.op}" if follower.module is None else follower.module
        nodes += [] if follower.index in nodes else [follower.index]
    yield Match(pattern.name, roles, tuple(nodes), norm_children=norm_children)


def _refuse_fold(pattern: LayerPattern, view: View, layer: Node, norms: list[Node]) -> str | None:
    """Says why the batch norm behind a layer cannot be folded into it; None if it can."""
    norm = norms[0]
    if len(norms) > 1:
        names = ", ".join(found.module or found.scope for found in norms)
        return f"{layer.module} feeds {len(norms)} batch norms ({names})"
    if view.only_user(layer) is None:
        readers = ", ".join(_called(view.graph.nodes[i]) for i in layer.users)
        return f"the output of {layer.module} has {len(layer.users)} readers ({readers})"
    if norm.module is None:
        return f"{norm.scope or 'the root'!r} does more than a batch norm, or calls it as a function"
    for guard in pattern.fold_guards:
        if reason := guard(view, norm):
            return f"{norm.module} {reason}"
    if reason := refuse_hooks(view, layer):
        return f"{layer.module} {reason}"
    return _refuse_children(view, norm) or _refuse_statistics(view, layer, norm)


def _behind(view: View, norm: Node) -> list[Node]:
    """Lists calls of the batch norm's children in a line behind it (timm's BatchNormAct2d has an activation)."""
    children: list[Node] = []
    node = view.only_user(norm)
    while node is not None and node.module is not None and node.module.startswith(f"{norm.module}."):
        children.append(node)
        node = view.only_user(node)
    return children


def _refuse_children(view: View, norm: Node) -> str | None:
    children = {node.module for node in _behind(view, norm)}
    for name, child in view.module(norm).named_modules(prefix=norm.module or ""):
        if not (name == norm.module or name in children or child._modules or type(child) is nn.Identity):
            return f"{norm.module} is a {type(view.module(norm)).__name__} that does more than its children in a line"
    inside = [node for node in view.graph.nodes if node.scope == norm.module or node.module in children]
    if len(inside) != 1 + len(children) or any(view.calls[name or ""] != 1 for name in children):
        return f"{norm.module} is a {type(view.module(norm)).__name__} that does more than a batch norm"
    return None


def _refuse_statistics(view: View, layer: Node, norm: Node) -> str | None:
    bn, module = view.module(norm), view.module(layer)
    assert isinstance(bn, _NormBase)
    if bn.running_mean is None or bn.running_var is None:
        return f"{norm.module} has no running statistics (track_running_stats=False)"
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    if bn.num_features != channels:
        return f"{norm.module} has {bn.num_features} channels, {layer.module} has {channels}"
    if isinstance(module, nn.Linear) and (layer.shape is None or len(layer.shape) != 2):
        shape = "of unknown rank" if layer.shape is None else f"{list(layer.shape)}"
        return f"{norm.module} normalizes axis 1, which is the feature axis of a [M, N] output only; got one {shape}"
    return None


def _called(node: Node) -> str:
    return "the output of the model" if node.op == "output" else node.module or node.target
