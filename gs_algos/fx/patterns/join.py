"""Matches operations that join activations: their operands may share one scale, so that integers can be joined."""

from __future__ import annotations

from collections.abc import Iterator

from gs_algos.fx.graph import Node
from gs_algos.fx.op_names import NOOPS
from gs_algos.fx.patterns.base import Match, View

HANDS_ON = ("cat", "index_select", *NOOPS)  # functions that change no value of what they are given


def find(pattern: str, view: View) -> Iterator[Match]:
    """Finds every call of the op with an operand that a module produces, and the activation behind the call.

    Of an operand that a concat or a selection hands on, the operands are those that went into it.
    """
    for node in view.graph.nodes:
        if node.op != pattern or len(node.inputs) < 2:
            continue
        operands = tuple(name for i in node.inputs for name in _producers(view, view.graph.nodes[i]))
        if not any(operands):
            continue
        roles, nodes = {}, [node.index]
        follower = view.only_user(node)
        if follower is not None and follower.op == "relu":
            roles["act"] = "F.relu" if follower.module is None else follower.module
            nodes.append(follower.index)
        yield Match(pattern, roles, tuple(nodes), operands)


def _producers(view: View, node: Node) -> tuple[str | None, ...]:
    """Returns the modules whose output this is; None for a function, and for a module called twice (two ranges)."""
    if node.op in HANDS_ON and node.module is None:
        return tuple(name for i in node.inputs for name in _producers(view, view.graph.nodes[i]))
    return (node.module if node.module and view.calls[node.module] == 1 else None,)
