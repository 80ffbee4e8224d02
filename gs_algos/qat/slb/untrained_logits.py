"""Notices that no optimizer trains the logits of a search: one made before `apply` holds the weights they replaced."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence

from torch import nn

from gs_algos.qat.slb.layers import SearchedLayer
from gs_algos.qat.untrained import FEW, Gradients, Moves, Watch

logger = logging.getLogger(__name__)


class SearchWatch:
    """Follows the logits of live layers, from `apply` until one of them moves.

    Args:
        replaced: the weights in whose place logits are. While one is still there, something may train it in vain.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[SearchedLayer], replaced: Sequence[weakref.ref[nn.Parameter]]
    ) -> None:
        self.layers = tuple(layer for layer in layers if not layer.fused)
        self.fused = tuple(layer for layer in layers if layer.fused)
        self.replaced = replaced
        self.logits = Watch(
            lambda: [layer.search.logits for layer in self.layers], lambda: _beside(model, layers), graded=True
        )
        self.beside = Moves(lambda: _beside(model, layers))
        self.gradients = Gradients(lambda: [p for p in map(_plain, self.fused) if p is not None])
        self.steps = 0

    def __getstate__(self) -> dict[str, object]:
        """Of a copied or pickled algorithm nothing is watched."""
        return {"layers": (), "fused": ()}

    def refuse(self, last: bool) -> None:
        """Raises RuntimeError if no logit can move. Call it at the start of each step.

        last: the codes are chosen in this step.
        """
        if self.layers:
            self._refuse_replaced(last)
        if self.fused:
            self._refuse_plain(last)

    def _refuse_replaced(self, last: bool) -> None:
        if any(layer.search.loaded is not None for layer in self.layers):
            self.logits.start()
            return
        if not self.logits.idle(last):
            return
        gc.collect()  # the graph that `apply` read holds the weights in cycles
        if any(ref() is not None for ref in self.replaced):
            raise RuntimeError(
                f"SLB.step: an optimizer must train the logits, got none that moved in {self.logits.steps} steps; it "
                "holds the weights that apply replaced: make it after apply, e.g. torch.optim.SGD(net.parameters(), lr)"
            )
        logger.warning(
            "SLB.step: no logit has moved in %d steps of training; give algo.logits() to an optimizer, or freeze them "
            "with requires_grad_(False)",
            self.logits.steps,
        )
        self.logits.end()

    def _refuse_plain(self, last: bool) -> None:
        """Logits of fused layers have no gradient: only the optimizers that were made for them train them."""
        if any(layer.search.owned for layer in self.fused):
            self.fused = ()
            self.gradients.stop()
            return
        self.steps += 1
        graded = self.gradients.seen()
        if not last and self.steps < FEW:
            return
        if graded or (not self.beside.replaced() and self.beside.moved()):
            raise RuntimeError(
                f"SLB.step: the logits of fused layers must be trained by SlbAdamW or SlbSGD, got neither in "
                f"{self.steps} steps; make SlbAdamW(algo.fused_layers()) beside the optimizer of algo.parameters(net)"
            )


def _plain(layer: SearchedLayer) -> nn.Parameter | None:
    """The weight that a fused layer keeps beside its logits."""
    return layer._parameters["weight"]


def _beside(model: nn.Module, layers: Sequence[SearchedLayer]) -> list[nn.Parameter]:
    """The parameters of a network that are neither logits nor weights of fused layers."""
    apart = {id(p) for layer in layers for p in (layer.search.logits, layer._parameters.get("weight"))}
    return [p for p in model.parameters() if id(p) not in apart]
