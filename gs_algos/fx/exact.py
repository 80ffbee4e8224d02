"""Which layers read nothing but a layer's output, through operations that commute with rounding to a grid."""

from __future__ import annotations

from collections.abc import Collection

from gs_algos.fx.graph import Node, SiteGraph

COMMUTES = ("relu", "relu6", "identity", "dropout", "flatten", "contiguous", "clone")  # dropout: in eval mode


def readers(graph: SiteGraph, site: str, folded: Collection[str], layers: Collection[str]) -> list[str]:
    """The sites of `layers` that read the output of `site`, in execution order; none if anything else reads it too.

    Between them may lie what is folded into the site (its batch norm), ReLUs, max pools, and reshapes.
    """
    calls = graph.calls(site)
    if len(calls) != 1 or graph.rung not in ("export", "symbolic_trace"):
        return []
    found: dict[int, str] = {}
    stack = list(calls[0].users)
    while stack:
        node = graph.nodes[stack.pop()]
        if node.module is not None and node.module in layers and len(graph.calls(node.module)) == 1:
            found[node.index] = node.module
        elif node.module in folded or node.op in COMMUTES or _is_max_pool(node):
            stack += node.users
        else:
            return []
    return [found[index] for index in sorted(found)]


def _is_max_pool(node: Node) -> bool:
    return node.op == "pool" and "max_pool2d" in node.target.lower().replace("maxpool", "max_pool")
