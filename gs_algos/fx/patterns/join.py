"""Matches operations that join activations: their operands may share one scale, so that integers can be joined."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx.graph import Node
from gs_algos.fx.patterns.base import Match, View


def find(pattern: str, view: View) -> Iterator[Match]:
    """Finds every call of the op with an operand that a module produces, and the activation behind the call."""
    for node in view.graph.nodes:
        if node.op != pattern or len(node.inputs) < 2:
            continue
        operands = tuple(_producer(view, view.graph.nodes[i]) for i in node.inputs)
        if not any(operands):
            continue
        roles, nodes = {}, [node.index]
        follower = view.only_user(node)
        if follower is not None and follower.op == "relu":
            roles["act"] = "F.relu" if follower.module is None else follower.module
            nodes.append(follower.index)
        yield Match(pattern, roles, tuple(nodes), operands)


def _producer(view: View, node: Node) -> str | None:
    """Returns the module whose output this is; None for a function, and for a module called twice (two ranges)."""
    return node.module if node.module and view.calls[node.module] == 1 else None
