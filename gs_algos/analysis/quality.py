"""Measures how good a network is on labelled data: the accuracy of a classifier, the perplexity of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from gs_algos.analysis.outputs import are_logits, kept_samples
from gs_algos.core.algorithm import Inputs, split_inputs

Z = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Quality:
    """Holds how good a network is.

    Args:
        name: "accuracy", the share of samples whose label has the largest logit; or "perplexity",
            `exp(mean of -log p(token | tokens before))`.
        low, high: 95 % interval: Wilson's of an accuracy; of a perplexity exp(mean +- 1.96 standard errors), from the
            means of the windows; a single window has none, low = high = value.
        count: samples, or tokens that were predicted.
    """

    name: str
    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.name == "accuracy":
            return f"{100 * self.value:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f})"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class BatchQuality:
    """Holds what one batch adds: for each sample 1 or 0 as its prediction is right; or for each window the sum of
    -log p of its tokens, and how many these are.
    """

    name: str
    sums: Tensor
    counts: Tensor


class QualitySum:
    """Sums the quality of batches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def plus(self, batch: BatchQuality) -> QualitySum:
        """Adds a batch; returns itself."""
        self.sums.append(batch.sums)
        self.counts.append(batch.counts)
        return self

    def quality(self) -> Quality | None:
        """Returns the quality over all batches; None if no sample had a label."""
        sums, counts = torch.cat(self.sums), torch.cat(self.counts)
        sums, counts = sums[counts > 0], counts[counts > 0]
        total = int(counts.sum())
        if not total:
            return None
        mean = float(sums.sum()) / total
        if self.name == "accuracy":
            return Quality(self.name, mean, *wilson(round(mean * total), total), total)
        means = sums / counts
        error = Z * float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        return Quality(self.name, _exp(mean), _exp(mean - error), _exp(mean + error), total)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, right of count, by Wilson's score."""
    p, z = right / count, Z * Z / count
    middle, half = (p + z / 2) / (1 + z), math.sqrt(z * p * (1 - p) + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def labels_of(batch: Any, inputs: Any) -> Any:
    """Returns the labels of a batch, of which `inputs` is the part that the network takes; None if there are none."""
    if isinstance(batch, Mapping):
        return batch.get("labels", batch.get("label"))
    if inputs is batch or not isinstance(batch, tuple | list):
        return None
    return batch[1 if inputs is batch[0] else len(inputs)]


def quality_of(output: Tensor, batch: Inputs, labels: Any, predicts_next: bool, who: str) -> BatchQuality | None:
    """Measures the logits of a batch: of tokens against the next ones, else against labels `[B]`.

    Labels below 0 do not count. Returns None where there is nothing to measure.

    Args:
        labels: of the batch, or None. Those of tokens `[B, T]`, as Transformers takes them, stand for the tokens.
        predicts_next: whether a network of tokens predicts the next one, from those before.

    Raises:
        ValueError: if a label is beyond the classes.
    """
    if not are_logits(output):
        return None
    targets = labels if isinstance(labels, Tensor) and labels.shape == output.shape[:-1] else None
    if output.dim() == 3:
        args, kwargs = split_inputs(batch)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not predicts_next or not _are_integers(ids) or ids.shape != output.shape[:2]:
            return None
        targets = (ids if targets is None else targets).to(output.device).long()
        return _surprise(output, _checked(targets, output, who), kept_samples(output, batch))
    if output.dim() != 2 or not _are_integers(targets):
        return None
    targets = _checked(targets.to(output.device).long(), output, who)
    right = (output.argmax(1) == targets) & output.isfinite().all(1)
    counted = targets >= 0
    return BatchQuality("accuracy", (right & counted).double().cpu(), counted.long().cpu())


def _are_integers(values: Any) -> TypeGuard[Tensor]:
    return isinstance(values, Tensor) and not values.is_floating_point() and values.dtype != torch.bool


def _checked(targets: Tensor, logits: Tensor, who: str) -> Tensor:
    classes = logits.shape[-1]
    if targets.numel() and int(targets.max()) >= classes:
        raise ValueError(f"{who}: labels must be below the {classes} classes of the outputs, got {int(targets.max())}")
    return targets


def _surprise(logits: Tensor, targets: Tensor, kept: Tensor) -> BatchQuality:
    """Sums -log p of each window's tokens but the first; of padding neither token nor prediction counts."""
    counted = kept[:, 1:] & kept[:, :-1] & (targets[:, 1:] >= 0)
    sums = [
        F.cross_entropy(window[:-1][use].float(), row[1:][use], reduction="sum").double()
        for window, row, use in zip(logits, targets, counted, strict=True)
    ]
    return BatchQuality("perplexity", torch.stack(sums).cpu(), counted.sum(1).cpu())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value == value else math.nan
