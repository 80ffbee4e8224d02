"""Analyzes a network before compression, and reports what compression did: one page each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.advice import Advisor, advise
from gs_algos.analysis.compare import compare
from gs_algos.analysis.comparison import Comparison
from gs_algos.analysis.effect import effect
from gs_algos.analysis.latency import layer_times
from gs_algos.analysis.probe import Policy
from gs_algos.analysis.report.page import Report
from gs_algos.analysis.sensitivity import CHOICES, fitting, sensitivity
from gs_algos.core.algorithm import Inputs, history
from gs_algos.core.batches import InputsOf, checked_batches, device_of, on_device, samples_of
from gs_algos.core.machine import machine
from gs_algos.core.network import network_of
from gs_algos.quant.scheme import Scheme
from gs_kernels.runtime.torch_private import tree_map_only

SAMPLES = 64  # images, or windows of text, that layers are compared on and advice is chosen on
TOKENS = 2048  # of them, at most
TOLERANCE = 0.05  # nats


def analyze(
    model: nn.Module,
    inputs: Inputs,
    data: Iterable[Any] = (),
    *,
    choices: Sequence[str | Scheme] = CHOICES,
    by: str = "auto",
    tolerance: float = TOLERANCE,
    samples: int = SAMPLES,
) -> Report:
    """Says how much a float network minds fewer bits, layer by layer, and which layers need more. It stays as it is.

    `print(report)` is a text, a notebook shows the page, and `report.save("page.html")` writes it.

    Args:
        inputs: of one call.
        data: batches of inputs, or of (inputs, labels), better some it was not trained on; default: `[inputs]`.
        choices: schemes of weights, from the smallest to the one that layers are raised to.
        by: the score, as `sensitivity` takes it.
        tolerance: divergence KL(float || rounded) in nats that is small enough.
        samples: how many of `data` are used to choose; as many again verify the advice.

    Raises:
        ValueError: as `sensitivity`.
    """
    who = "analyze"
    _refuse_tolerance(who, tolerance)
    bits = [Scheme.parse(choice, "weight").bits for choice in choices]
    if bits and bits[-1] < max(bits):
        raise ValueError(
            f"{who}: choices must end with the most bits, got {', '.join(map(str, choices))}; reorder them"
        )
    network = network_of(model, who)
    chosen_on, others = _split(who, network, data or [inputs], samples)
    found = sensitivity(network, chosen_on, choices, by=by, who=who)
    advisor = Advisor(network, chosen_on, others, who)
    texts = [str(Scheme.parse(choice, "weight")) for choice in choices]
    fits = fitting(network, texts, who)
    advice = []
    for scheme in texts[:-1]:
        weights = {site: scheme for site, own in fits.items() if scheme in own and texts[-1] in own}
        raised = advisor.raised(Policy(weights), tolerance, texts[-1]) if weights else None
        if raised is not None:
            advice.append(raised)
    return Report(
        type(network).__name__,
        sensitivity=found,
        advice=tuple(advice),
        notes=_notes(others),
        made=_made(network),
    )


def report(
    before: nn.Module,
    after: nn.Module,
    data: Iterable[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    inputs: Inputs | None = None,
    batches: Sequence[int] = (),
    tolerance: float = TOLERANCE,
    samples: int = SAMPLES,
    seconds: float = 1.0,
    search: Mapping[str, Any] | None = None,
    title: str = "",
) -> Report:
    """Shows on one page what compression did to a network, and what to do next. Both networks stay as they are.

    Args:
        before: the float network.
        after: what was made of it, by any algorithm: prepared, converted, pruned or packed.
        data: batches of inputs, or of (inputs, labels): all of them give the accuracy, or a language model's
            perplexity; the first ones are those that layers are compared on.
        path: of the page to be written; None: it is only returned.
        inputs: of one call, for times, work and memory; default: the first batch.
        batches: samples of the forwards that are timed; default: 1, and those of `inputs`.
        tolerance: divergence in nats that needs no advice.
        samples: that layers are compared on, and advice is chosen on.
        seconds: for how long each is timed.
        search: what `gs_algos.analysis.report.search.search_of` read from SLB before `convert`.
        title: of the page; default: the class of the network.

    Raises:
        ValueError: if there is no data, the networks do not belong together, or the page cannot be written.
    """
    who = "report"
    _refuse_tolerance(who, tolerance)
    first, second = network_of(before, who), network_of(after, who)
    again = data if isinstance(data, Sequence) or hasattr(data, "__len__") else list(data)
    chosen_on, others = _split(who, first, again, samples)
    given = inputs if inputs is not None else chosen_on[0]
    comparison = compare(first, second, chosen_on)
    measured = effect(first, second, given, again, batches=batches, seconds=seconds)
    times = layer_times(first, given, seconds=seconds), layer_times(second, given, seconds=seconds)
    wanted: dict[str, Any] = {"tolerance": tolerance, "measured": measured, "times": times, "who": who}
    page = Report(
        title or type(first).__name__,
        measured,
        comparison,
        times=times,
        advice=advise(first, second, comparison, chosen_on, others, **wanted),
        history=tuple(history(second)),
        search=search or {},
        channels=_channels(comparison, first, second),
        notes=(*comparison.notes, *measured.notes, *_notes(others)),
        made=_made(second),
    )
    if path is not None:
        page.save(path)
    return page


def _refuse_tolerance(who: str, tolerance: float) -> None:
    if not tolerance >= 0:
        raise ValueError(f"{who}: tolerance must be 0 nats or more, got {tolerance}")


def _split(who: str, network: nn.Module, data: Iterable[Any], samples: int) -> tuple[list[Inputs], list[Inputs]]:
    """Takes the inputs of the first samples, and of as many again, from batches."""
    if samples < 1:
        raise ValueError(f"{who}: samples must be at least 1, got {samples}")
    inputs_of = InputsOf(who, network, None)
    parts: list[Inputs] = []
    count = 0
    for batch in checked_batches(who, data):
        inputs = on_device(inputs_of(batch), device_of(network))
        size = samples_of(inputs)
        length = _length(inputs)
        allowed = min(samples, max(1, TOKENS // length))
        parts += _pieces(inputs, size, allowed)
        count += size
        if count >= 2 * allowed:
            break
    if not parts:
        raise ValueError(f"{who}: at least one batch must be given, got none")
    first: list[Inputs] = []
    while parts and sum(map(samples_of, first)) < min(allowed, -(-count // 2)):
        first.append(parts.pop(0))
    rest: list[Inputs] = []
    while parts and sum(map(samples_of, rest)) < allowed:
        rest.append(parts.pop(0))
    return first, rest


def _length(inputs: Any) -> int:
    """Returns the tokens of a sample of a language model; 1 of an image."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    whole = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2
    return int(ids.shape[1]) if whole else 1  # type: ignore[union-attr]


def _pieces(inputs: Inputs, size: int, most: int) -> list[Inputs]:
    """Splits a batch into pieces of at most half of the samples that are wanted."""
    step = max(1, min(most, -(-size // 2)))
    if size <= 1:
        return [inputs]

    def piece(start: int) -> Any:
        return tree_map_only(Tensor, lambda t: t[start : start + step] if t.dim() and len(t) == size else t, inputs)

    return [piece(start) for start in range(0, size, step)]


def _channels(comparison: Comparison, before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the output channels of layers that lost some."""
    found = {}
    modules, cut = dict(before.named_modules()), dict(after.named_modules())
    for one in comparison.layers:
        if one.site in modules:
            counts = [_outputs(networks[one.site]) for networks in (modules, cut)]
            if None not in counts and counts[0] != counts[1]:
                found[one.site] = counts[0], counts[1]
    return found  # type: ignore[return-value]


def _outputs(layer: Any) -> int | None:
    count = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return count if isinstance(count, int) else None


def _notes(others: Sequence[Inputs]) -> tuple[str, ...]:
    return () if others else ("there were no other samples to verify advice on than those it was chosen on",)


def _made(network: nn.Module) -> dict[str, str]:
    tensor = next(chain(network.parameters(), network.buffers()), torch.empty(0))
    facts = {key: str(value) for key, value in machine(tensor.device.type).items() if value is not None}
    return {"date": date.today().isoformat(), **facts}
