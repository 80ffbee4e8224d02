"""Tells how much a network minds the rounding of each of its weights, one at a time, all else left float.

Three scores, for each layer and each scheme:

- `kl`: the mean divergence KL(p_float || p_rounded) of class probabilities, in nats, by running the network with that
  weight rounded; only what lies behind the layer is run again. Outputs that are no logits are compared by squared error
  over the square of the float outputs.
- `gradient`: the same, predicted to second order from one forward and one backward pass of a batch, without labels.
- `nsr`: squared change of the layer's own outputs over their square; says nothing about what is behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gs_algos.analysis.divergence import divergence_scores
from gs_algos.analysis.fisher import fisher_scores
from gs_algos.analysis.layers import stacked_note
from gs_algos.analysis.noise import noise_scores
from gs_algos.core.algorithm import Inputs
from gs_algos.core.batches import InputsOf, checked_batches, samples_of
from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of
from gs_algos.core.plan import render_layers
from gs_algos.core.table import Table
from gs_algos.quant.packed.packable import base_of, matrix_of
from gs_algos.quant.scheme import PerGroup, Scheme

logger = logging.getLogger(__name__)

WHO = "sensitivity"
SCORES = ("kl", "gradient", "nsr")
MOST_RUN = 100  # layers, from which on "auto" predicts instead of running each
CHOICES = ("int2@channel", "int4@channel", "int8@channel")


@dataclass(frozen=True)
class Sensitivity:
    """Holds what rounding each weight costs. `str(sensitivity)` is a table, the most sensitive layer first.

    Args:
        scores: layer -> scheme -> score.
        by: `kl`, `gradient` or `nsr`.
        samples: that the scores are means of: images, or tokens.
        readers: layers in groups that read the same tensor, as `gradient` finds them.
        seconds: that it took.
        notes: what has no score, and why.
    """

    scores: Mapping[str, Mapping[str, float]]
    by: str
    samples: int = 0
    readers: Sequence[tuple[str, ...]] = field(default_factory=tuple)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        schemes = list(dict.fromkeys(scheme for own in self.scores.values() for scheme in own))
        worst = sorted(self.scores, key=lambda site: -max(self.scores[site].values(), default=0.0))
        rows = [(site, *(_number(self.scores[site].get(scheme)) for scheme in schemes)) for site in worst]
        of = {"kl": "divergence in nats", "gradient": "predicted divergence in nats", "nsr": "noise over signal"}
        below = [
            f"{of[self.by]}, from {self.samples:,} samples in {self.seconds:.1f} s",
            *(f"note: {note}" for note in self.notes),
        ]
        return render_layers(("layer", *schemes), rows, WHO, below)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def sensitivity(
    model: nn.Module,
    batches: Iterable[Inputs],
    choices: Sequence[str | Scheme] | Mapping[str, Sequence[str | Scheme]] = CHOICES,
    *,
    by: str = "auto",
    seed: int = 0,
    who: str = WHO,
) -> Sensitivity:
    """Measures what rounding each weight to nearest costs, for each scheme. The network is left as it was.

    A sample is a row of logits: a token where the network returns `[B, T, classes]`, else an image. Tokens that
    `attention_mask` leaves out do not count. Labels are not needed: those of `(inputs, labels)` are left out.

    Args:
        model: in any mode; it is run in eval mode.
        batches: of inputs; some hundred images or some thousand tokens.
        choices: schemes of every linear and convolution that they fit, or layer -> schemes.
        by: `kl`, `gradient` or `nsr`; `auto` is `kl`, and `gradient` from 100 layers on.
        seed: of the labels that `gradient` draws from the network's own outputs.

    Raises:
        ValueError: if there is no batch, `by` or a layer is unknown, no layer fits a scheme, or a value that the
            network gives is not finite.
    """
    if by not in (*SCORES, "auto"):
        raise ValueError(f"{who}: by must be one of {', '.join(SCORES)} or auto, got {by!r}{did_you_mean(by, SCORES)}")
    started = time.perf_counter()
    network = network_of(model, who)
    inputs_of = InputsOf(who, network, None)
    data = [inputs_of(batch) for batch in checked_batches(who, batches)]
    if not data:
        raise ValueError(f"{who}: at least one batch must be given, got none")
    chosen = _choices(network, choices, who)
    by = by if by != "auto" else "kl" if len(chosen) <= MOST_RUN else "gradient"
    samples, readers = 0, []
    if by == "gradient":
        found = fisher_scores(network, data, chosen, seed, who)
        scores, samples, readers = found.scores, found.samples, found.readers
    elif by == "kl":
        scores, samples = divergence_scores(network, data, chosen, who)
    else:
        scores = noise_scores(network, data, chosen, who)
        samples = sum(map(samples_of, data))
    for site, own in scores.items():
        if not any(own.values()):
            logger.warning("%s: %s makes no difference to the outputs", who, site)
    notes = tuple(filter(None, [stacked_note(network)]))
    return Sensitivity(scores, by, samples, tuple(readers), time.perf_counter() - started, notes)


def fitting(network: nn.Module, schemes: Sequence[str | Scheme], who: str = WHO) -> dict[str, list[str]]:
    """Returns every linear and convolution with those of the schemes whose groups divide its weight.

    Raises:
        ValueError: if no layer fits a scheme.
    """
    parsed = [Scheme.parse(scheme, "weight") for scheme in schemes]
    found: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        if base_of(module) in (None, nn.Embedding) or weight is None:
            continue
        k = matrix_of(module, weight).shape[1]
        own = [str(s) for s in parsed if not isinstance(s.granularity, PerGroup) or k % s.granularity.size == 0]
        if own:
            found[name] = own
    if not found:
        texts = ", ".join(map(str, schemes))
        raise ValueError(f"{who}: at least one linear or convolution must fit a scheme, got none for {texts}")
    return found


def _choices(network: nn.Module, choices: Any, who: str) -> dict[str, list[str]]:
    if not isinstance(choices, Mapping):
        return fitting(network, choices, who)
    for site in choices:
        get_module(network, site)
    return {site: [str(Scheme.parse(s, "weight")) for s in schemes] for site, schemes in choices.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
