"""Says what to do next with a compressed network. What is advised has been tried on it first, on a private copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gs_algos.analysis.comparison import Comparison, JoinComparison, LayerComparison
from gs_algos.analysis.divergence import Outcome, Trials
from gs_algos.analysis.effect import Effect
from gs_algos.analysis.latency import LayerTimes
from gs_algos.analysis.layers import some_of
from gs_algos.analysis.probe import Policy, Probe
from gs_algos.analysis.sensitivity import sensitivity
from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.layer_rules import rules_for
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLinear
from gs_algos.quant.packed.packable import base_of, matrix_of
from gs_algos.quant.scheme import Scheme
from gs_kernels.runtime.torch_private import _BatchNorm

INTEGER = (QuantizedConv.__name__, QuantizedLinear.__name__)  # layers whose scales are above 0
RAISED = "int8@channel"  # what a layer is raised to
BETTER = 0.95  # of the divergence, that a change must get below to be advised
CLIPPED, FEW_LEVELS, SPREAD = 0.01, 0.5, 8.0
SLOWER = 1.05
WIDE = 8  # bits that operands of an add or a concat are given
TRIED = 4  # layers whose observer is tried, of each kind
MOST_SHOWN = 6


@dataclass(frozen=True)
class Advice:
    """Says one thing to do.

    Args:
        text: what.
        why: the number that was measured, in a sentence.
        rules: what to paste into the algorithm, `rules=[...]`; or "".
        verified: what a run with it gave, in a sentence; "" if nothing had to be run.
        predicted: divergence on the samples that it was chosen on.
        measured: divergence on others.
    """

    text: str
    why: str
    rules: str = ""
    verified: str = ""
    predicted: Outcome | None = None
    measured: Outcome | None = None

    def __str__(self) -> str:
        return "\n".join([f"advice: {self.text}", *(f"  {t}" for t in (self.why, self.rules, self.verified) if t)])


class Advisor:
    """Tries policies on the samples that advice is chosen on, and verifies what helps on others.

    Args:
        before: the float network.
        chosen_on: batches that advice is chosen on.
        others: batches that it is verified on; the same where there are no more.
        names: layer of the float network -> its name in rules, where that is another.
        integer: layers that multiply integers once compressed.
    """

    def __init__(
        self,
        before: nn.Module,
        chosen_on: Sequence[Inputs],
        others: Sequence[Inputs],
        who: str,
        names: Mapping[str, str] | None = None,
        integer: Collection[str] = (),
    ) -> None:
        self.who, self.chosen_on, self.names = who, list(chosen_on), dict(names or {})
        self.probe = Probe(before, who, integer)
        self.trials = Trials(self.probe, self.chosen_on)
        self.others = Trials(self.probe, others) if others else self.trials

    def raised(self, policy: Policy, tolerance: float, to: str = RAISED) -> Advice | None:
        """Finds the fewest layers to raise so that the divergence is at most `tolerance`; None if it is already.

        Layers are raised in the order of what the second-order prediction says they save, and the network runs with
        all of them at once: as often as it takes to bisect their number.
        """
        low = {site: scheme for site, scheme in policy.weights.items() if self._may_rise(site, scheme, to)}
        start = self.trials(policy)
        if start.divergence <= tolerance or not low:
            return None
        by = "gradient" if all(one.logits for one in self.trials.references) else "nsr"
        found = sensitivity(
            self.probe.network, self.chosen_on, {s: (scheme, to) for s, scheme in low.items()}, by=by, who=self.who
        )
        gain = {site: own[_text(low[site])] - own[_text(to)] for site, own in found.scores.items()}
        order = sorted(low, key=lambda site: -gain[site])
        first, last, at = 1, len(order), {}
        while first < last:
            middle = (first + last) // 2
            at[middle] = self.trials(policy.raised(dict.fromkeys(order[:middle], to)))
            first, last = (first, middle) if at[middle].divergence <= tolerance else (middle + 1, last)
        chosen = dict.fromkeys(order[:last], to)
        predicted = at[last] if last in at else self.trials(policy.raised(chosen))
        if not predicted.divergence < BETTER * start.divergence:
            return None
        measured = self.others(policy.raised(chosen))
        held = measured.divergence <= tolerance * 1.25
        target = "" if predicted.divergence <= tolerance else f", and the divergence is still above {tolerance:g} nats"
        named = {self._name(site): scheme for site, scheme in chosen.items()}
        return Advice(
            f"Give {_count(last, len(policy.weights))} {to} for their weights"
            + (f"{target}: leave more of the network float" if target else ""),
            f"Rounded as it is now, the divergence is {start.divergence:.3g} nats and the error of the outputs "
            f"{start.error:.1%}; these layers are predicted to save most: {some_of(named)}.",
            f"rules={list(rules_for(named))!r}",
            f"with nearest rounding it is {predicted.divergence:.3g} nats and {predicted.error:.1%}; on "
            f"{measured.samples:,} {self._others} {measured.divergence:.3g} nats and {measured.error:.1%}"
            + ("." if held or target else f", more than the {tolerance:g} nats that were asked for."),
            predicted,
            measured,
        )

    def joined(self, joins: Sequence[JoinComparison], policy: Policy) -> Advice | None:
        """Advises more bits for the operands of adds and concats that have fewer than 8, all at once."""
        narrow = [one for one in joins if Scheme.parse(one.act, "act").bits < WIDE]
        if not narrow:
            return None
        wide = {one.site: _widened(one.act) for one in narrow}
        wider = replace(policy, joins={**policy.joins, **wide})
        start, predicted = self.trials(policy), self.trials(wider)
        if not predicted.divergence < BETTER * start.divergence:
            return None
        before, measured = self.others(policy), self.others(wider)
        worst = min(narrow, key=lambda one: one.sqnr)
        rules = rules_for({one.layer: wide[one.site] for one in narrow}, "join")
        return Advice(
            f"Give the operands of {_count(len(narrow), len(joins), 'add or concat', 'adds and concats')} {WIDE} bits",
            f"Rounding them to {worst.act} leaves the {worst.site} an SQNR of {worst.sqnr:.1f} dB, the least of all.",
            f"rules={list(rules)!r}",
            f"the divergence falls from {start.divergence:.3g} to {predicted.divergence:.3g} nats and the error of the "
            f"outputs from {start.error:.1%} to {predicted.error:.1%}; on {measured.samples:,} {self._others} from "
            f"{before.divergence:.3g} to {measured.divergence:.3g} nats.",
            predicted,
            measured,
        )

    def observers(self, layers: Sequence[LayerComparison], policy: Policy) -> list[Advice]:
        """Advises other ranges where inputs are clipped, levels unused, or channels of one scale differ."""
        start, weights, acts = self.trials(policy), policy.weights, policy.acts
        found: list[Advice] = []
        for one in sorted(layers, key=lambda one: -(one.clipped or 0.0))[:TRIED]:
            if one.clipped is not None and one.clipped > CLIPPED and one.float_site in acts:
                found += self._wider(one, start, policy)
        unused = [one for one in layers if one.float_site in weights and 0 < one.levels_used < FEW_LEVELS * one.levels]
        for one in unused[:TRIED]:
            scheme = weights[one.float_site]
            other = scheme.replace(":mse", ":minmax") if ":mse" in scheme else f"{scheme.split(':minmax')[0]}:mse"
            why = f"{one.levels_used} of the {one.levels} levels of {one.site} are used."
            found += self._instead(one.float_site, other, why, start, policy)
        spread = [(self._spread(one.float_site), one) for one in layers if "@tensor" in weights.get(one.float_site, "")]
        for ratio, one in sorted(spread, key=lambda pair: -pair[0])[:TRIED]:
            if ratio > SPREAD:
                other = weights[one.float_site].replace("@tensor", "@channel")
                why = f"The largest channel of {one.site} is {ratio:.0f} times the median one, with one scale for both."
                found += self._instead(one.float_site, other, why, start, policy)
        return found

    def _wider(self, one: LayerComparison, start: Outcome, policy: Policy) -> list[Advice]:
        held = self.probe.ranges.pop(one.float_site)
        self.probe.find_ranges(self.chosen_on, [one.float_site])
        now = self.trials(policy)
        self.probe.ranges[one.float_site] = held
        if not now.divergence < BETTER * start.divergence:
            return []
        bits = policy.acts[one.float_site].partition(":")[0]
        return [
            Advice(
                f"Let the inputs of {one.site} keep their whole range",
                f"{one.clipped:.1%} of them are clipped.",
                f"rules=[({one.site!r}, {{'act': '{bits}:minmax'}})]",
                f"the divergence falls from {start.divergence:.3g} to {now.divergence:.3g} nats.",
                now,
            )
        ]

    def _instead(self, site: str, scheme: str, why: str, start: Outcome, policy: Policy) -> list[Advice]:
        now = self.trials(policy.raised({site: scheme}))
        if not now.divergence < BETTER * start.divergence:
            return []
        falls = f"the divergence falls from {start.divergence:.3g} to {now.divergence:.3g} nats."
        rules = f"rules=[({self._name(site)!r}, {{'weight': {scheme!r}}})]"
        return [Advice(f"Round the weight of {self._name(site)} by {scheme}", why, rules, falls, now)]

    @property
    def _others(self) -> str:
        return "other samples" if self.others is not self.trials else "the same samples"

    def _name(self, site: str) -> str:
        return self.names.get(site, site)

    def _spread(self, site: str) -> float:
        layer = self.probe.layer(site)
        largest = matrix_of(layer, layer.weight).detach().float().abs().amax(1)
        return float(largest.max() / largest.median().clamp(min=1e-12))

    def _may_rise(self, site: str, scheme: str, to: str) -> bool:
        layer: Any = self.probe.layer(site)
        return base_of(layer) not in (None, nn.Embedding) and _bits(scheme) < _bits(to)


def advise(
    before: nn.Module,
    after: nn.Module,
    comparison: Comparison,
    chosen_on: Sequence[Inputs],
    others: Sequence[Inputs] = (),
    *,
    tolerance: float = 0.01,
    measured: Effect | None = None,
    times: tuple[LayerTimes, LayerTimes] | None = None,
    who: str = "advise",
) -> tuple[Advice, ...]:
    """Returns what to do next with a compressed network, most useful first; both networks stay as they are.

    Weights are tried with nearest rounding: what was rounded better, or trained, does at least as well.

    Args:
        comparison: of both.
        chosen_on: batches that advice is chosen on.
        others: batches that it is verified on.
        tolerance: divergence in nats that is small enough.
        measured: the effect of the compression, whose times were taken in turns.
        times: of the layers of both networks.
    """
    weights, acts = _schemes_of(comparison)
    found: list[Advice] = []
    if weights:
        names = {one.float_site: one.site for one in comparison.layers}
        integer = [one.float_site for one in comparison.layers if one.kind in INTEGER]
        advisor = Advisor(before, chosen_on, others, who, names, integer)
        ranges = {one.float_site: one.input_range for one in comparison.layers}
        advisor.probe.ranges |= {site: held for site in acts if (held := ranges[site]) is not None}
        advisor.probe.ranges |= {one.site: one.grid_range for one in comparison.joins}
        advisor.probe.operands |= {one.site: one.places for one in comparison.joins}
        acts = {site: scheme for site, scheme in acts.items() if site in advisor.probe.ranges}
        policy = Policy(weights, acts, {one.site: one.act for one in comparison.joins})
        tried = advisor.raised(policy, tolerance), advisor.joined(comparison.joins, policy)
        found += sorted((one for one in tried if one is not None), key=_predicted)
        found += advisor.observers(comparison.layers, policy)
        found += _fresh_norms(after, advisor)
    if measured is not None and times is not None and weights:
        found += _slower(comparison, measured, *times)
    return tuple(found)


def _schemes_of(comparison: Comparison) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the schemes of weights and of inputs that a probe can play; levels of a search are none."""
    weights, acts = {}, {}
    for one in comparison.layers:
        if one.levels and one.float_nbytes and _parses(one.weight, "weight"):
            weights[one.float_site] = one.weight
            if one.act and one.input_range is not None and _parses(one.act, "act"):
                acts[one.float_site] = one.act
    return weights, acts


def _fresh_norms(after: nn.Module, advisor: Advisor) -> list[Advice]:
    """Advises to measure the statistics of batch norms anew where that helps the compressed network."""
    if not any(isinstance(module, _BatchNorm) and module.track_running_stats for module in after.modules()):
        return []
    start = advisor.trials.compared(after)
    other = copy.deepcopy(after).eval()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()
        for batch in advisor.chosen_on:
            run(other, batch, advisor.who)
    other.eval()
    now = advisor.others.compared(other)
    before = start if advisor.others is advisor.trials else advisor.others.compared(after.eval())
    if not now.divergence < BETTER * before.divergence:
        return []
    return [
        Advice(
            "Measure the running statistics of the batch norms anew, with weights as they are now",
            "Rounded weights give other means and variances than those that the batch norms keep.",
            "",
            f"the divergence on other samples falls from {before.divergence:.3g} to {now.divergence:.3g} nats.",
            now,
        )
    ]


def _slower(comparison: Comparison, measured: Effect, before: LayerTimes, after: LayerTimes) -> list[Advice]:
    """Advises to leave layers float where the compressed network is slower."""
    batch = max(measured.after.ms)
    ms = [facts.ms[batch].p50 for facts in (measured.before, measured.after)]
    if ms[1] <= SLOWER * ms[0]:
        return []
    held = {one.site for one in comparison.layers if one.levels}
    names = {one.site: one.float_site for one in comparison.layers}
    lost = {site: ms - before.layers.get(names[site], 0.0) for site, ms in after.layers.items() if site in held}
    worst = [site for site in sorted(lost, key=lambda site: -lost[site]) if lost[site] > 0][:MOST_SHOWN]
    what = f"{', '.join(f'{site} {lost[site]:+.2f} ms' for site in worst)}." if worst else "it is lost between layers."
    return [
        Advice(
            "Leave the layers float that are slower packed, where time counts more than bytes",
            f"A forward of {batch} takes {ms[1]:.2f} ms, the float network {ms[0]:.2f} ms; of layers: {what}",
            f"rules={[(site, None) for site in worst]!r}" if worst else "",
        )
    ]


def _parses(text: str, role: Any) -> bool:
    try:
        return bool(Scheme.parse(text, role))
    except ValueError:
        return False


def _text(scheme: str) -> str:
    return str(Scheme.parse(scheme, "weight"))


def _bits(scheme: str) -> int:
    return Scheme.parse(scheme, "weight").bits


def _predicted(one: Advice) -> float:
    return math.inf if one.predicted is None else one.predicted.divergence


def _widened(scheme: str) -> str:
    """Returns a scheme of activations with 8 bits."""
    return scheme.replace(f"int{Scheme.parse(scheme, 'act').bits}@", f"int{WIDE}@", 1)


def _count(some: int, of: int, one: str = "layer", more: str = "layers") -> str:
    return f"every {one}" if some == of else f"{some} of {of} {more}"
