"""Defines the site graph: one list of nodes, whichever tracer read the model, with qualified names of live modules.

A graph is a lens: rewrites change the live modules at the names found here, never the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from gs_algos.fx.op_names import PRODUCTS


@dataclass(frozen=True)
class Node:
    """Describes one operation of the captured forward pass."""

    index: int  # position in SiteGraph.nodes, which is execution order
    op: str  # canonical name (gs_algos/fx/op_names.py), "input", "output" or "other"
    inputs: tuple[int, ...]  # indices of the producing nodes in argument order; parameters and buffers are not inputs
    users: tuple[int, ...]  # indices of the nodes that read this output, each once
    module: str | None  # qualified name of the live leaf module whose whole forward is this op; None: functional
    scope: str  # qualified name of the innermost live module that ran it, "" for the root
    weight: str | None  # qualified name of the parameter used as weight; None: there is none, or it is computed
    target: str  # as the tracer calls it, for messages
    reads: tuple[str, ...] = ()  # every parameter that the op reads, `weight` among them
    shape: tuple[int, ...] | None = None  # of the output for the example inputs; None: not known or not one tensor


@dataclass(frozen=True)
class SiteGraph:
    """Holds the nodes of one forward pass, and which tracer found them.

    The tracers "export" and "symbolic_trace" see every edge; "children" sees the edges inside each traced child; "walk"
    sees no edge, only which leaf modules ran, in what order and how often.
    """

    tracer: str
    nodes: tuple[Node, ...]
    notes: tuple[str, ...]  # why each tracer that was tried before failed, the first line of its own words

    def calls(self, module: str) -> tuple[Node, ...]:
        """Returns every call of the leaf module of this qualified name."""
        return tuple(node for node in self.nodes if node.module == module)

    def multiplies(self, node: Node) -> bool:
        """Says whether a node is a matrix product with a parameter, or with a value made of one alone (a transpose)."""
        made = any(self.nodes[i].reads and not self.nodes[i].inputs for i in node.inputs)
        return (node.op in PRODUCTS and bool(node.reads)) or (node.op in (*PRODUCTS, "linear") and made)
