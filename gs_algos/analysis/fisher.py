"""Predicts how much a network minds the rounding of each of its weights, without labels and without running it rounded.

With p the softmax of the network's outputs, rounding one weight changes the outputs y of its layer by dy, and to second
order `KL(p_float || p_rounded) = 1/2 E<g, dy>^2`, where g is the gradient at y of `-log p(label)` for a label that is
drawn from p itself: the Fisher information (Martens 2014, arXiv:1412.1193). One forward and one backward pass of a
batch give g for all layers, and each choice for a layer costs one product more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.analysis.outputs import are_logits, class_rows, kept_samples, output_of
from gs_algos.core.algorithm import Inputs, evaluating, run, without_parameter_gradients
from gs_algos.core.batches import tensor_in
from gs_algos.core.modules import get_module, own_forward
from gs_algos.core.network import ordinary_tensors, without_autocast
from gs_algos.core.progress import progress
from gs_algos.quant.packed.grid import Grid, grid_of
from gs_algos.quant.packed.packable import CONVS, base_of, matrix_of
from gs_algos.quant.scheme import Scheme


@dataclass
class FisherScores:
    """Holds what rounding each weight is predicted to cost.

    Args:
        scores: layer -> scheme -> predicted KL divergence in nats, a sample; 0 for a layer that no sample reached.
        readers: layers in groups that read the same tensor, such as the projections of query, key and value.
        samples: rows of logits that were averaged over: images, or tokens.
    """

    scores: dict[str, dict[str, float]]
    readers: list[tuple[str, ...]] = field(default_factory=list)
    samples: int = 0


def fisher_scores(
    network: nn.Module, batches: Sequence[Inputs], choices: Mapping[str, Sequence[str]], seed: int, who: str
) -> FisherScores:
    """Predicts the KL divergence that rounding one weight to nearest causes, for each choice of each layer.

    A sample is a row of logits: a token where the network returns `[B, T, classes]`, else an image. Tokens that
    `attention_mask` leaves out do not count. The network is left as it was.

    Raises:
        ValueError: if no token counts, the network returns no logits of two classes and more, or one of its values is
            not finite.
    """
    found = FisherScores({site: dict.fromkeys(schemes, 0.0) for site, schemes in choices.items()})
    with ordinary_tensors(), without_autocast():
        probes = {site: RoundedLayer.of(get_module(network, site), schemes) for site, schemes in choices.items()}
        generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
        with evaluating(network), torch.enable_grad(), without_parameter_gradients(network):
            for number, batch in enumerate(progress(batches, "measuring sensitivity")):
                readers = _measure(network, batch, probes, found, generator, who)
                found.readers = found.readers if number else readers
    if not found.samples:
        raise ValueError(f"{who}: one token at least must count, got attention masks that leave all of them out")
    for site, scores in found.scores.items():
        for scheme, total in scores.items():
            if not total < float("inf"):
                raise ValueError(f"{who}: the gradients of {site} must be finite, got NaN or Inf")
            scores[scheme] = total / (2 * found.samples)
    return found


class RoundedLayer:
    """Computes by how much the outputs of one layer change if its weight is rounded."""

    def __init__(self, layer: nn.Module, grids: dict[str, Grid]) -> None:
        self.layer: Any = layer
        self.grids = grids

    @classmethod
    def of(cls, layer: Any, schemes: Sequence[str]) -> RoundedLayer:
        rows = matrix_of(layer, layer.weight.detach())
        return cls(layer, {str(scheme): grid_of(rows, Scheme.parse(scheme, "weight")) for scheme in schemes})

    def change(self, x: Tensor, scheme: str) -> Tensor:
        """Returns the outputs for x with the rounded weight less those with the float one."""
        weight = self.layer.weight.detach()
        rows, grid = matrix_of(self.layer, weight), self.grids[scheme]
        values = grid.values(grid.codes(rows))
        if own_forward(self.layer, base_of(self.layer) or nn.Linear):
            rounded = values.view(weight.shape).to(weight.dtype)
            return _with_weight(self.layer, rounded).forward(x) - _with_weight(self.layer, weight).forward(x)
        difference = (values - rows.float()).to(x.dtype)
        if isinstance(self.layer, CONVS):
            return self.layer._conv_forward(x, difference.view(weight.shape), None)
        return F.linear(x, difference)

    def per_sample(self, product: Tensor, samples: int, tokens: int) -> Tensor:
        """Sums a product of the layer's outputs over each sample; over each row by itself where samples are tokens."""
        if tokens or product.shape[0] % samples:
            return product.sum(1 if isinstance(self.layer, CONVS) else -1).flatten()
        return product.reshape(samples, -1).sum(1)


def _with_weight(layer: Any, weight: Tensor) -> Any:
    """Returns a layer that shares all with this one but its weight; calling its `forward` calls no hooks."""
    twin = copy.copy(layer)
    twin.__dict__["_parameters"] = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def _measure(
    network: nn.Module,
    batch: Inputs,
    probes: Mapping[str, RoundedLayer],
    found: FisherScores,
    generator: torch.Generator,
    who: str,
) -> list[tuple[str, ...]]:
    """Adds the scores of one batch to `found`; returns the layers that read the same tensors."""
    seen: dict[tuple[int, int], list[str]] = {}  # tensor and its version -> layers that read it
    inputs: dict[tuple[int, int], Tensor] = {}  # copies: what follows may change a tensor in place
    held: list[Tensor] = []  # so that no tensor takes the identity of another
    counted: list[int] = []  # samples, and whether they are tokens; known when the gradients come

    def watch(site: str, probe: RoundedLayer) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            given = tensor_in((args, kwargs))
            key = id(given), given._version
            held.append(given)
            if site not in seen.setdefault(key, []):
                seen[key].append(site)
            if key not in inputs:
                inputs[key] = given.detach().clone()
            x = inputs[key]
            if not y.requires_grad:
                y = y.detach().requires_grad_().clone()  # no leaf, which may not be changed in place

            def score(g: Tensor) -> None:
                for scheme in probe.grids:
                    with torch.no_grad():
                        per_sample = probe.per_sample(g.float() * probe.change(x, scheme).float(), *counted)
                    found.scores[site][scheme] += float(per_sample.double().square().sum())

            y.register_hook(score)
            return y

        return after

    with ExitStack() as stack:
        for site, probe in probes.items():
            handle = probe.layer.register_forward_hook(watch(site, probe), with_kwargs=True)
            stack.callback(handle.remove)
        logits = _logits(run(network, batch, who), who)
        kept = kept_samples(logits, batch)
        counted += [kept.numel(), int(logits.dim() == 3)]
        _fisher_loss(logits, kept, generator).backward()
    found.samples += int(kept.sum())
    return [tuple(sites) for sites in seen.values()]


def _logits(outputs: Any, who: str) -> Tensor:
    """Returns the logits of a network's outputs, checked."""
    logits = output_of(outputs)
    if logits is None or not are_logits(logits):
        got = "no tensor" if logits is None else f"outputs {list(logits.shape)}"
        raise ValueError(f"{who}: the network must return logits [B, classes] or [B, T, classes], got {got}")
    if not logits.requires_grad:
        raise ValueError(f"{who}: the outputs must depend on the layers, got outputs that do not")
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{who}: the network must return finite logits, got NaN or Inf")
    return logits


def _fisher_loss(logits: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the sum of `-log p(label)` over the samples that count, with labels drawn from p."""
    flat = class_rows(logits.float())
    labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)
    losses = -flat.log_softmax(-1).gather(1, labels).view(len(kept), -1)
    return (losses * kept.reshape(len(kept), -1)).sum()
