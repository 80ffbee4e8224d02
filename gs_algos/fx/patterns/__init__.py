"""Matches patterns over the site graph. A pattern is one file with `search(view)`, and one name in ORDER.

Every Conv and Linear of the model is in exactly one Match, or is the site of exactly one Refusal. A batch norm that
cannot be folded is the site of a further Refusal; the layer in front of it is then a Match without the role `bn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from torch import nn

from gs_algos.core.modules import get_module
from gs_algos.fx import op_names
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.patterns.base import Match, Refusal, View

__all__ = ["ORDER", "Match", "Refusal", "match"]

ORDER = ("conv_bn_act", "linear_act", "add", "cat")


def match(graph: SiteGraph, model: nn.Module) -> tuple[list[Match], list[Refusal]]:
    """Finds every match and every refusal of every pattern; `model` is the one that `capture` read.

    Whoever folds a batch norm away must keep `Match.norm_children`, which run behind it (timm's BatchNormAct2d).
    """
    view = View(graph, model)
    results: list[Match | Refusal] = []
    for name in ORDER:
        results += import_module(f"gs_algos.fx.patterns.{name}").search(view)
    matches = [item for item in results if isinstance(item, Match)]
    refusals = [item for item in results if isinstance(item, Refusal)]
    named = {name for item in matches for name in item.roles.values()} | {item.site for item in refusals}
    refusals += _unknown_norms(view, named)
    refusals += _idle(view, named)
    refusals += _products(view)
    return matches, refusals


def _unknown_norms(view: View, named: set[str]) -> Iterator[Refusal]:
    """Refuses batch norms whose producer the graph does not know."""
    for node in view.graph.nodes:
        if node.op == "batch_norm" and node.module and node.module not in named and not node.inputs:
            reason = f"what feeds it is not known: the graph was read by {view.graph.tracer}, without edges here"
            yield Refusal(ORDER[0], node.module, reason)


def _idle(view: View, named: set[str]) -> Iterator[Refusal]:
    """Refuses layers that did not run, or not as a module."""
    opaque = {node.module for node in view.graph.nodes if node.module and node.op == "other"}
    for name, module in view.model.named_modules():
        if not isinstance(module, op_names.SITES) or name in named:
            continue
        inside = next((leaf for leaf in opaque if name.startswith(f"{leaf}.")), None)
        readers = view.foreign_readers(name)
        if inside:
            reason = f"runs inside {inside!r}, which was read as one operation"
        elif readers:
            reason = f"its parameters are read by {view.describe(readers[0])}, not by the module"
        else:
            reason = "did not run on the example inputs in eval mode"
        yield Refusal(ORDER[1] if isinstance(module, nn.Linear) else ORDER[0], name, reason)


def _products(view: View) -> Iterator[Refusal]:
    """Refuses matrix products with a parameter that are neither conv nor linear, e.g. the Conv1D of GPT-2."""
    nodes = [node for node in view.graph.nodes if node.op in op_names.PRODUCTS and view.graph.multiplies(node)]
    for site, scope in {name: node.scope for node in nodes for name in view.matrices(node)}.items():
        kind, flat = type(get_module(view.model, scope)).__name__, view.model.get_parameter(site).dim() == 2
        if flat and not isinstance(
            get_module(view.model, scope), op_names.SITES
        ):  # a plan has its own words for stacks
            yield Refusal(ORDER[1], site, f"{kind} multiplies by its parameter with a matrix product, not with linear")
