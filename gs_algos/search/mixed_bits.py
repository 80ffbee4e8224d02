"""Gives each layer the bits it needs: weight schemes chosen layer by layer under a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gs_algos.analysis.sensitivity import Sensitivity, sensitivity
from gs_algos.core.algorithm import Inputs
from gs_algos.core.batches import InputsOf, checked_batches
from gs_algos.core.layer_rules import Rule, rules_for
from gs_algos.core.network import network_of
from gs_algos.core.plan import render_layers, totals_of
from gs_algos.ptq.config import WIDTHS
from gs_algos.ptq.sites import Site, WeightRule, check_schemes, weight_sites
from gs_algos.quant.packed.experts import ExpertStack
from gs_algos.quant.packed.packable import format_of
from gs_algos.quant.scheme import Scheme
from gs_algos.search.budget import UNITS, Budget
from gs_algos.search.knapsack import knapsack

WHO = "mixed_bits"
CHOICES = ("int2@group:64", "int4@group:64", "int8@channel")


@dataclass(frozen=True)
class MixedBits:
    """Holds the schemes that `mixed_bits` chose. `str()` shows them as a table.

    Args:
        rules: for PTQ, SimQAT, `quantize_weights` or a recipe: one for each scheme.
        schemes: layer -> its scheme.
        scores: layer -> predicted KL divergence of that scheme, in nats a sample.
        bits: mean stored bits of a weight of these layers, with scales and zero points.
        nbytes: of the whole network, with what stays float.
        samples: that the scores are means of.
        notes: what there is to know beside.
    """

    rules: tuple[Rule, ...]
    schemes: Mapping[str, str]
    scores: Mapping[str, float]
    bits: float
    nbytes: int
    samples: int
    notes: tuple[str, ...] = ()

    @property
    def divergence(self) -> float:
        """Returns the predicted KL divergence of the network: the sum of the scores."""
        return sum(self.scores.values())

    def __str__(self) -> str:
        rows = [(site, scheme, f"{self.scores[site]:.2e}") for site, scheme in self.schemes.items()]
        counts = ", ".join(f"{count} x {scheme}" for scheme, count in Counter(self.schemes.values()).items())
        size = f"{self.bits:.2f} bits a weight, {self.nbytes:,} bytes"
        below = [
            f"{counts}; {size}; predicted divergence {self.divergence:.3g} nats, from {self.samples:,} samples",
            *(f"note: {note}" for note in self.notes),
            f"rules={list(self.rules)!r}",
        ]
        return render_layers(("layer", "weight", "divergence"), rows, WHO, below)


def parse_budget(text: str) -> Budget:
    """Reads the text of a budget: `4.5 bits` a weight, `80 MB` or `30% bytes` in all.

    Raises:
        ValueError: if it is none of the three forms.
    """
    return Budget.parse(text, WHO, ("bits", "%bytes", *UNITS), "'4.5 bits', '80 MB' or '30% bytes'")


def mixed_bits(
    model: nn.Module,
    batches: Iterable[Inputs],
    budget: str = "4.5 bits",
    choices: Sequence[str | Scheme] = CHOICES,
    *,
    embeddings: str | Scheme | None = None,
    rules: Sequence[WeightRule] = (),
    seed: int = 0,
) -> MixedBits:
    """Chooses a scheme for the weights of each layer so that outputs change least and all fit the budget.

    What a scheme costs is the `gradient` score of `sensitivity`: the KL divergence that rounding this weight to nearest
    would cause, from a forward and a backward pass of each batch, without labels. `knapsack` makes the sum over layers
    least. Layers that read the same tensor, such as the projections of query, key and value, get the same scheme.
    The network is left as it was.

    Args:
        batches: of inputs; some thousand tokens or some hundred images are enough.
        budget: `4.5 bits`: mean stored bits of a weight with a choice, scales included. `80 MB`, `30% bytes`: of the
            whole network, with what stays float; the percentage is of its float bytes.
        choices: schemes with 1, 2, 3, 4 or 8 bits; a group that does not divide a layer is no choice there.
        embeddings: scheme of every `nn.Embedding`; None leaves them, and linears tied to them, float.
        rules: as in `quantize_weights`: layers with a scheme of their own, or None to leave them float.
        seed: of the labels that are drawn from the network's own outputs.

    Raises:
        ValueError: if the budget cannot be met, or as `weight_sites` and `sensitivity`.
    """
    schemes = [str(Scheme.parse(choice, "weight")) for choice in choices]
    if len(set(schemes)) < 2:
        raise ValueError(f"{WHO}: choices must be two schemes or more, got {list(map(str, choices))}")
    for scheme in schemes:
        check_schemes(scheme, embeddings, rules, WHO, WIDTHS)
    limit = parse_budget(budget)
    network = network_of(model, WHO)
    inputs_of = InputsOf(WHO, network, None)
    data = [inputs_of(batch) for batch in checked_batches(WHO, batches)]
    free, fixed = _sites(network, embeddings, rules)
    fits = {site.names[0]: _fitting(site, schemes) for site in free}
    choices_of = {name: list(sizes) for name, sizes in fits.items()}
    found = sensitivity(network, data, choices_of, by="gradient", seed=seed, who=WHO)
    together = _together(found, list(fits), fits)
    sizes = [{s: sum(fits[name][s] for name in names) for s in _common(names, fits)} for names in together]
    scores = [
        {s: sum(found.scores[name][s] for name in names) for s in options}
        for names, options in zip(together, sizes, strict=True)
    ]
    after = {site.names[0]: _nbytes(site, str(site.scheme)) for site in fixed}
    numbers = sum(_weight(site).numel() for site in free)
    totals = totals_of(network, {**dict.fromkeys(fits, 0), **after})
    others = 0 if limit.unit == "bits" else totals.after
    allowed = int(limit.of(totals.before, numbers)) - others
    least = sum(min(options.values()) for options in sizes)
    if allowed < least:
        least_is = f"{8 * least / numbers:.2f} bits a weight, {totals.after + least:,} bytes in all"
        raise ValueError(f"{WHO}: the budget must allow the smallest choices, {least_is}, got {budget!r}")
    picks = knapsack([list(o.values()) for o in scores], [list(o.values()) for o in sizes], allowed)
    chosen = {
        name: list(options)[pick] for names, options, pick in zip(together, sizes, picks, strict=True) for name in names
    }
    chosen = {name: chosen[name] for name in fits}
    nbytes = sum(fits[name][scheme] for name, scheme in chosen.items())
    notes = [f"{name} can take {', '.join(own) or 'none'}" for name, own in fits.items() if len(own) < len(schemes)]
    return MixedBits(
        rules_for(chosen),
        chosen,
        {name: found.scores[name][scheme] for name, scheme in chosen.items()},
        8 * nbytes / numbers,
        totals.after + nbytes,
        found.samples,
        tuple(notes),
    )


def _weight(site: Site) -> Any:
    return site.layer.weight


def _nbytes(site: Site, scheme: str) -> int:
    """Returns the bytes of a packed weight, with scales in 16 bits."""
    return format_of(site.layer, _weight(site).to("meta"), Scheme.parse(scheme, "weight")).nbytes


def _sites(
    network: nn.Module, embeddings: str | Scheme | None, rules: Sequence[WeightRule]
) -> tuple[list[Site], list[Site]]:
    """Returns the weights that have a choice, and those whose scheme a rule or `embeddings` sets."""
    one, other = (weight_sites(network, scheme, embeddings, rules, WHO, WIDTHS) for scheme in _PROBES)
    quantized = [(a, b) for a, b in zip(one, other, strict=True) if a.scheme is not None]
    free = [a for a, b in quantized if a.scheme != b.scheme]
    stack = next((site for site in free if isinstance(site.layer, ExpertStack)), None)
    if stack is not None:
        raise ValueError(
            f"{WHO}: experts must be given a scheme by a rule, got none for {stack.names[0]}; add "
            "('re:.*experts.*', 'int4@group:32') to rules"
        )
    if not free:
        raise ValueError(f"{WHO}: at least one layer must have a choice, got none that no rule sets")
    return free, [a for a, b in quantized if a.scheme == b.scheme]


_PROBES = ("int8@channel:asym", "int4@channel:asym")  # what no rule sets follows the default


def _fitting(site: Site, schemes: Sequence[str]) -> dict[str, int]:
    """Returns the schemes whose groups divide the weight, with the bytes it takes then.

    Raises:
        ValueError: if there is none.
    """
    found = {}
    for text in schemes:
        try:
            found[text] = _nbytes(site, text)
        except ValueError as error:
            reason = str(error)
    if not found:
        raise ValueError(f"{WHO}: one choice must fit {site.names[0]}, got none: {reason}")
    return found


def _together(found: Sensitivity, names: Sequence[str], fits: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Returns the layers in groups that get one scheme: those that read one tensor and have a choice in common."""
    groups: list[list[str]] = []
    for readers in found.readers:
        placed = {name for group in groups for name in group}
        group = [name for name in readers if name not in placed]
        if group and _common(group, fits):
            groups.append(group)
    placed = {name for group in groups for name in group}
    return groups + [[name] for name in names if name not in placed]


def _common(names: Sequence[str], fits: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [scheme for scheme in fits[names[0]] if all(scheme in fits[name] for name in names)]
