"""Finds the consumers of a layer's output in a site graph, and the operations that its epilogue can compute."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gs_algos.fx.graph import Node, SiteGraph
from gs_algos.fx.op_names import ACTIVATIONS

# commute with rounding to a grid; dropout: in eval mode
COMMUTES = ("relu", "relu6", "identity", "dropout", "flatten", "contiguous", "clone", "cat", "index_select")
COMPUTED_FROM_CODES = ("add", "pool")  # are computed from codes as they are from floats
EDGES = ("export", "symbolic_trace")  # tracers that see every edge


@dataclass(frozen=True)
class PossibleEpilogue:
    """Names the activation module or the add that a layer can compute in its own call, or says why there is none.

    Args:
        activation: qualified name of the module whose work the layer can do; None: there is none.
        adds: whether the layer can add the other operand of a sum to its output.
        returned: whether the network returns that sum, which then must be there.
        reason: why an activation or an add that reads the output is not done in the layer's call; "" if all is.
    """

    activation: str | None = None
    adds: bool = False
    returned: bool = False
    reason: str = ""


def consumers(graph: SiteGraph, site: str, folded: Collection[str], layers: Collection[str]) -> list[str]:
    """Lists those of `layers` that read the output of `site`, in execution order; none if anything else reads it too.

    Between them may lie what is folded into the site (its batch norm), ReLUs, max pools, reshapes, and concats.
    """
    sites: dict[int, str] = {}
    stack = _users(graph, site)
    if stack is None:
        return []
    while stack:
        node = graph.nodes[stack.pop()]
        if node.module is not None and node.module in layers and len(graph.calls(node.module)) == 1:
            sites[node.index] = node.module
        elif node.module in folded or node.op in COMMUTES or _is_max_pool(node):
            stack += node.users
        else:
            return []
    return [sites[index] for index in sorted(sites)]


def consumers_accept_codes(graph: SiteGraph, site: str, folded: Collection[str], layers: Collection[str]) -> bool:
    """Says whether everything that reads the output of `site`, which is on a grid, can be computed from its codes.

    Those are layers, adds that write into nothing, pools, and what commutes with rounding.
    """
    stack = _users(graph, site)
    if not stack:
        return False
    while stack:
        node = graph.nodes[stack.pop()]
        if node.module in layers or (node.op in COMPUTED_FROM_CODES and not _writes(node) and not _leaves(graph, node)):
            continue
        if node.module not in folded and node.op not in COMMUTES:
            return False
        stack += node.users
    return True


def possible_epilogue(graph: SiteGraph, site: str, folded: Collection[str]) -> PossibleEpilogue:
    """Finds which operation behind a layer, and behind its folded batch norm, the layer can do in its own call."""
    users = _users(graph, site)
    while users is not None and len(users) == 1 and graph.nodes[users[0]].module in folded:
        users = list(graph.nodes[users[0]].users)
    nodes = [graph.nodes[i] for i in users or ()]
    epilogue = next((node for node in nodes if node.op in (*ACTIVATIONS, "add")), None)
    if epilogue is None:
        return PossibleEpilogue()
    what = epilogue.module or epilogue.op
    if len(nodes) > 1:
        return PossibleEpilogue(reason=f"{what} is not fused: {len(nodes)} operations read the output")
    if epilogue.op == "add":
        if _writes(epilogue):
            return PossibleEpilogue(reason="the add is not fused: it writes into an operand")
        return PossibleEpilogue(adds=True, returned=_leaves(graph, epilogue))
    if epilogue.module is None:
        return PossibleEpilogue(reason=f"{what} is not fused: it is a function")
    calls = len(graph.calls(epilogue.module))
    if calls > 1:
        return PossibleEpilogue(reason=f"{what} is not fused: it is called {calls} times")
    return PossibleEpilogue(activation=epilogue.module)


def _users(graph: SiteGraph, site: str) -> list[int] | None:
    """Returns the nodes that read the output of a module which is called once; None if they are not known."""
    calls = graph.calls(site)
    return list(calls[0].users) if len(calls) == 1 and graph.tracer in EDGES else None


def _leaves(graph: SiteGraph, node: Node) -> bool:
    """Says whether the network may return this result, or a value that other operations make of it unread."""
    stack, seen = [node], {node.index}
    while stack:
        for index in stack.pop().users:
            user = graph.nodes[index]
            if user.op == "output":
                return True
            opaque = user.op == "other" and user.module is not None  # may return what it is given
            if (opaque or user.op in (*COMMUTES, *ACTIVATIONS) or _is_max_pool(user)) and index not in seen:
                seen.add(index)
                stack.append(user)
    return False


def _writes(node: Node) -> bool:
    """Says whether an operation writes into its first operand."""
    return f"{node.op}_" in node.target or f"i{node.op}" in node.target


def _is_max_pool(node: Node) -> bool:
    return node.op == "pool" and "max_pool2d" in node.target.lower().replace("maxpool", "max_pool")
