"""Measures how much a network minds the rounding of each weight by running it with that weight rounded.

The score of a choice is the mean divergence KL(p_float || p_rounded) of the network's class probabilities, in nats and
from fp32 logits; for outputs that are no logits it is the squared error over the square of the float outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.outputs import are_logits, class_rows, kept_samples, kl_divergence, output_of
from gs_algos.analysis.partial_run import PartialRun
from gs_algos.analysis.probe import Policy, Probe
from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.network import ordinary_tensors, without_autocast
from gs_algos.core.progress import progress
from gs_algos.quant.integer.quantized_tensor import dequantized


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
                    with probe.set(Policy({site: scheme})):
                        scores[site][scheme] += reference.divergence(runs.behind(site))
    return {site: {s: total / samples for s, total in own.items()} for site, own in scores.items()}, samples


@dataclass(frozen=True)
class Outcome:
    """Says how far outputs are from those of the float network.

    Args:
        divergence: as the scores of `divergence_scores`.
        error: `rms(after - before) / rms(before)` of the outputs.
        samples: images or tokens.
    """

    divergence: float
    error: float
    samples: int


class Trials:
    """Tries policies on the same batches: much rounded at once."""

    def __init__(self, probe: Probe, batches: Sequence[Inputs]) -> None:
        self.probe, self.batches = probe, list(batches)
        with self._running():
            outputs = (run(probe.network, batch, probe.who) for batch in self.batches)
            self.references = [Reference(y, x, probe.who) for y, x in zip(outputs, self.batches, strict=True)]

    def __call__(self, policy: Policy) -> Outcome:
        with self._running(), self.probe.set(policy):
            return self.compared(self.probe.network)

    @torch.no_grad()
    def compared(self, network: nn.Module) -> Outcome:
        """Runs another network on the batches, and compares its outputs."""
        total = difference = square = 0.0
        for batch, reference in zip(self.batches, self.references, strict=True):
            outputs = run(network, batch, self.probe.who)
            total += reference.divergence(outputs)
            difference += reference.difference(outputs)
            square += reference.square
        samples = sum(reference.samples for reference in self.references)
        return Outcome(total / max(1, samples), math.sqrt(difference / (square or 1.0)), samples)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ordinary_tensors(), without_autocast(), torch.no_grad():
            yield


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
        self.outputs = dequantized(found)
        self.square = float(self.outputs.double().square().sum())

    def _found(self, outputs: Any) -> Tensor:
        found = output_of(outputs)
        assert found is not None
        return dequantized(found)  # type: ignore[no-any-return]

    def difference(self, outputs: Any) -> float:
        """Returns the sum of squared differences of the outputs."""
        return float((self._found(outputs).double() - self.outputs.double()).square().sum())

    def divergence(self, outputs: Any) -> float:
        """Returns the sum over samples of KL(before || after); inf if the outputs are not finite."""
        found = self._found(outputs)
        if not self.logits:
            error = self.difference(found) / (self.square or 1.0)
            return error * self.samples if error == error else float("inf")
        want, got = (class_rows(t.float()).log_softmax(-1) for t in (self.outputs, found))
        rows = kl_divergence(want, got).view(self.kept.numel(), -1).sum(-1)
        total = float(rows[self.kept.flatten()].double().sum())
        return total if total == total else float("inf")
