"""Measures how much a network minds the rounding of each weight by running it with that weight rounded.

The score of a choice is the mean divergence KL(p_float || p_rounded) of the network's class probabilities, in nats and
from fp32 logits; for outputs that are no logits it is the squared error over the square of the float outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.outputs import are_logits, class_rows, kept_samples, kl_divergence, output_of
from gs_algos.analysis.partial_run import PartialRun
from gs_algos.analysis.probe import Probe
from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.network import ordinary_tensors, without_autocast
from gs_algos.core.progress import progress


def divergence_scores(
    model: nn.Module, batches: Sequence[Inputs], choices: Mapping[str, Sequence[str]], who: str
) -> tuple[dict[str, dict[str, float]], int]:
    """Returns layer -> scheme -> score, and the samples that they are means of. The network is left as it was.

    Raises:
        ValueError: if the outputs hold no float tensor, or are not finite.
    """
    probe = Probe(model, who)
    runs, samples = PartialRun(probe.network, who), 0
    scores = {site: dict.fromkeys(schemes, 0.0) for site, schemes in choices.items()}
    with ordinary_tensors(), without_autocast():
        for batch in progress(batches, "measuring sensitivity"):
            reference = Reference(runs.start(batch), batch, who)
            samples += reference.samples
            for site, schemes in choices.items():
                for scheme in schemes:
                    with probe.set({site: scheme}):
                        scores[site][scheme] += reference.divergence(runs.behind(site))
    return {site: {s: total / samples for s, total in own.items()} for site, own in scores.items()}, samples


def policy_divergence(
    probe: Probe, batches: Sequence[Inputs], weights: Mapping[str, str], acts: Mapping[str, str] | None = None
) -> float:
    """Returns the divergence of a network with all these weights, and inputs of layers, rounded at once."""
    total, samples = 0.0, 0
    with ordinary_tensors(), without_autocast(), torch.no_grad():
        for batch in batches:
            reference = Reference(run(probe.network, batch, probe.who), batch, probe.who)
            with probe.set(weights, acts):
                total += reference.divergence(run(probe.network, batch, probe.who))
            samples += reference.samples
    return total / max(1, samples)


class Reference:
    """Holds the float network's outputs of one batch, to which others are compared.

    samples: rows of logits that count, images or tokens.
    """

    def __init__(self, outputs: Any, batch: Inputs, who: str) -> None:
        found = output_of(outputs)
        if found is None:
            raise ValueError(f"{who}: the network must return a float tensor, got none")
        if not bool(found.isfinite().all()):
            raise ValueError(f"{who}: the network must return finite outputs, got NaN or Inf")
        self.logits = are_logits(found)
        self.kept = kept_samples(found, batch) if self.logits else torch.ones(found.shape[:1], dtype=torch.bool)
        self.samples = int(self.kept.sum())
        self.want = self._rows(found)
        self.square = float(self.want.double().square().sum())

    def _rows(self, outputs: Tensor) -> Tensor:
        return class_rows(outputs.float()).log_softmax(-1) if self.logits else outputs.float()

    def divergence(self, outputs: Any) -> float:
        """Returns the sum over samples of KL(before || after); inf if the outputs are not finite."""
        found = output_of(outputs)
        assert found is not None
        got = self._rows(found)
        if not self.logits:
            error = float((got - self.want).double().square().sum()) / (self.square or 1.0)
            return error * self.samples if error == error else float("inf")
        rows = kl_divergence(self.want, got).view(self.kept.numel(), -1).sum(-1)
        total = float(rows[self.kept.flatten()].double().sum())
        return total if total == total else float("inf")
