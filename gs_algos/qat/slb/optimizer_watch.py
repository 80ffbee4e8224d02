"""Detects that no optimizer trains the logits of a search: one made before `apply` holds the weights they replaced."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence

from torch import nn

from gs_algos.qat.optimizer_watch import FIRST_CHECK, ChangeDetector, GradientDetector, TrainingWatch
from gs_algos.qat.slb.layers import SearchedLayer

logger = logging.getLogger(__name__)


class LogitsWatch:
    """Watches the logits of live layers, from `apply` until one of them changes.

    Args:
        replaced: the weights whose place logits took. While one is alive, an optimizer may train it in vain.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[SearchedLayer], replaced: Sequence[weakref.ref[nn.Parameter]]
    ) -> None:
        self.layers = tuple(layer for layer in layers if not layer.fused)
        self.fused = tuple(layer for layer in layers if layer.fused)
        self.replaced = replaced
        self.logits = TrainingWatch(
            lambda: [layer.search.logits for layer in self.layers],
            lambda: _other_parameters(model, layers),
            use_gradients=True,
        )
        self.others = ChangeDetector(lambda: _other_parameters(model, layers))
        self.gradients = GradientDetector(lambda: [p for p in map(_mixture, self.fused) if p is not None])
        self.steps = 0

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what is watched: a copied or pickled algorithm watches nothing."""
        return {"layers": (), "fused": ()}

    def refuse_untrained(self, last: bool) -> None:
        """Raises RuntimeError if no optimizer can train the logits. Call it at the start of each step.

        last: the codes are chosen in this step.
        """
        if self.layers:
            self._refuse_replaced(last)
        if self.fused:
            self._refuse_without_optimizer(last)

    def _refuse_replaced(self, last: bool) -> None:
        """Raises if an optimizer may hold the weights that the logits replaced; warns if none trains at all."""
        if any(layer.search.loaded is not None for layer in self.layers):
            self.logits.start()
            return
        if not self.logits.untrained(last):
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

    def _refuse_without_optimizer(self, last: bool) -> None:
        """Raises if no fused optimizer was made: logits of fused layers have no gradient that another could read."""
        if any(layer.search.owned for layer in self.fused):
            self.fused = ()
            self.gradients.stop()
            return
        self.steps += 1
        received = self.gradients.any_received()
        if not last and self.steps < FIRST_CHECK:
            return
        if received or (not self.others.replaced() and self.others.changed()):
            raise RuntimeError(
                f"SLB.step: the logits of fused layers must be trained by SlbAdamW or SlbSGD, got neither in "
                f"{self.steps} steps; make SlbAdamW(algo.fused_layers()) beside the optimizer of algo.parameters(net)"
            )


def _mixture(layer: SearchedLayer) -> nn.Parameter | None:
    """Returns the parameter `weight` that a fused layer keeps beside its logits."""
    return layer._parameters["weight"]


def _other_parameters(model: nn.Module, layers: Sequence[SearchedLayer]) -> list[nn.Parameter]:
    """Lists the parameters of a network that are neither logits nor weights of fused layers."""
    searched = {id(p) for layer in layers for p in (layer.search.logits, layer._parameters.get("weight"))}
    return [p for p in model.parameters() if id(p) not in searched]
