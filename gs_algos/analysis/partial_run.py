"""Runs a network once, and then again from one layer on: what does not lie behind the layer keeps its values."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from gs_algos.core.algorithm import Inputs, describe_error, run, split_inputs
from gs_algos.core.modules import TRACING
from gs_kernels.runtime.torch_private import tree_leaves

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**30  # of the values of a batch that are kept, at most


class PartialRun:
    """Runs a network whose layers are changed in place between runs; the results are those of whole runs, bit for bit.

    A network that torch.fx cannot trace, inputs by keyword, values that take more than `KEPT_BYTES`, and operations
    that write into values of the first run are all served by whole runs.
    """

    def __init__(self, network: nn.Module, who: str) -> None:
        self.network, self.who = network, who
        self._graph: fx.GraphModule | None = None
        self._behind: dict[str, set[fx.Node]] = {}
        self._values: dict[fx.Node, Any] | None = None
        self._batch: Inputs = ()
        try:
            with TRACING:
                self._graph = fx.symbolic_trace(network)
        except Exception as error:  # noqa: BLE001  a tracer may raise anything; whole runs do as well
            logger.debug("%s: runs the whole network each time: %s", who, describe_error(error))

    @property
    def partial(self) -> bool:
        """Says whether the next runs of this batch re-run a part of the network only."""
        return self._values is not None

    @torch.no_grad()
    def start(self, batch: Inputs) -> Any:
        """Runs the whole network on a batch, for whose values the next calls of `behind` are."""
        self._batch, self._values = batch, None
        outputs = run(self.network, batch, self.who)
        args, kwargs = split_inputs(batch)
        if self._graph is None or kwargs:
            return outputs
        interpreter = fx.Interpreter(self._graph, garbage_collect_values=False)
        try:
            again = interpreter.run(*args)
        except Exception as error:  # noqa: BLE001  the whole network ran, so this is the tracer's fault
            logger.debug("%s: runs the whole network each time: %s", self.who, describe_error(error))
            self._graph = None
            return outputs
        size = sum({id(t): t.numel() * t.element_size() for t in _tensors(list(interpreter.env.values()))}.values())
        if size <= KEPT_BYTES and _equal(outputs, again):
            self._values = dict(interpreter.env)
        return outputs

    @torch.no_grad()
    def behind(self, site: str) -> Any:
        """Runs what depends on a layer, and returns the network's outputs. `start` came before."""
        if self._values is None or self._graph is None:
            return run(self.network, self._batch, self.who)
        if site not in self._behind:
            self._behind[site] = _descendants(self._graph, site)
        kept = {node: value for node, value in self._values.items() if node not in self._behind[site]}
        stamps = [(t, t._version) for t in _tensors(list(kept.values()))]
        interpreter = fx.Interpreter(self._graph, garbage_collect_values=False)
        outputs = interpreter.run(*split_inputs(self._batch)[0], initial_env=kept)
        if any(t._version != stamp for t, stamp in stamps):
            self._values = self._graph = None
            return run(self.network, self._batch, self.who)
        return outputs


def _descendants(graph: fx.GraphModule, site: str) -> set[fx.Node]:
    """Returns the calls of a layer and all that reads them, directly or not."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        own = node.op == "call_module" and str(node.target) == site
        reads = node.op == "get_attr" and str(node.target).rpartition(".")[0] == site
        if own or reads or node.op == "output" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _equal(a: Any, b: Any) -> bool:
    first, second = _tensors(a), _tensors(b)
    return len(first) == len(second) and all(map(torch.equal, first, second))
