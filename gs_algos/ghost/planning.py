"""Plans which convolutions become ghost layers: what each takes before and after, measured, or why it stays."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run, split_inputs
from gs_algos.core.batches import refuse_empty
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import get_module, own_forward, set_module
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import Plan, PlanRow
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.timing import time_in_turns
from gs_algos.core.untouched import untouched
from gs_algos.fx.capture.capture import capture
from gs_algos.fx.patterns import match
from gs_algos.ghost.config import GhostConfig
from gs_algos.ghost.fit import error_of, fitted, moments_of_filters, write
from gs_algos.ghost.layers import GhostConv2d, can_split, primary_channels
from gs_algos.quant.network.planning import keep_row, refused_rows

LEAST_CHANNELS = 16
SECONDS = 0.02  # that each layer is timed for, before and after
CONVS = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class GhostPlan(RowSettings):
    """Says how a convolution is replaced.

    Args:
        ratio, kernel: as in `GhostConfig`.
        norm: the batch norm behind it, which the ghost layer takes in; None: it has none, or it stays where it is.
        ordered: whether the channels have an order of their own.
        error: share of the variance of the outputs that the fit leaves out, for inputs of white noise; None: no fit.
    """

    form: ClassVar[str] = "ghost"

    ratio: int
    kernel: int
    norm: str | None = None
    ordered: bool = False
    error: float | None = None

    def other_names(self) -> tuple[str, ...]:
        return () if self.norm is None else (self.norm,)


@dataclass(frozen=True)
class Taken:
    """Holds what a layer takes: multiply-adds of a forward, bytes of parameters, ms of a forward."""

    macs: int
    nbytes: int
    ms: float


def make_plan(name: str, config: GhostConfig, model: nn.Module, inputs: Inputs) -> tuple[Plan, dict[str, GhostConv2d]]:
    """Decides for every convolution; returns the plan, and the layers that it puts in. The model stays as it is.

    Raises:
        ValueError: if the inputs hold no sample or do not run through the model, or a rule matches nothing.
    """
    refuse_empty(inputs, "Ghost")
    graph = capture(model, *split_inputs(inputs))
    matches, refusals = match(graph, model)
    convs = {site: m for site, m in model.named_modules() if isinstance(m, CONVS)}
    refusals = [one for one in refusals if one.pattern == "conv_bn_act"]
    rows = {row.site: row for row in refused_rows(refusals, convs)}
    norms = {found.roles["conv"]: _norm_of(model, found) for found in matches if "conv" in found.roles}
    first = next((node.module for node in graph.nodes if node.module in convs), None)
    settings = resolve(config.rules, convs, config.defaults(), config.who) if convs else {}
    shapes = input_shapes(model, inputs, convs)
    made: dict[str, GhostConv2d] = {}
    sums = [Taken(0, 0, 0.0), Taken(0, 0, 0.0)]
    for site, conv in convs.items():
        if site in rows:
            continue
        chosen = settings[site]
        reason = why_kept(model, site, conv, chosen) or ("is the first convolution" if site == first else "")
        if not reason and site not in shapes:
            reason = "did not run on the example inputs in eval mode"
        if reason or chosen is None:
            rows[site] = keep_row(site, conv, reason or "left as it is by a rule")
            continue
        norm = norms.get(site)
        row, layer, taken = _row(site, conv, norm, model, chosen, config, shapes[site])  # type: ignore[arg-type]
        rows[site] = row
        if row.settings is not None:
            made[site] = layer
            sums = [Taken(a.macs + b.macs, a.nbytes + b.nbytes, a.ms + b.ms) for a, b in zip(sums, taken, strict=True)]
    known = {name for name, _ in model.named_modules()}
    functions = [row for row in refused_rows(refusals, {}) if row.site not in known]
    notes = (*graph.notes, *([_changes("the layers that are replaced", *sums)] if made else []))
    ordered = [rows[site] for site in convs] + functions
    return Plan(name, graph.tracer, tuple(ordered), notes), made


def why_kept(model: nn.Module, site: str, conv: Any, chosen: Mapping[str, Any] | None) -> str:
    """Says why a convolution cannot become a ghost layer; "" if it can."""
    if not isinstance(conv, nn.Conv2d):
        return f"is a {type(conv).__name__}, and only two-dimensional convolutions have ghosts"
    if site.rpartition(".")[0] and isinstance(get_module(model, site.rpartition(".")[0]), GhostConv2d):
        return "is part of a ghost layer"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "is depthwise: each channel follows from one already"
    if conv.groups > 1:
        return f"has {conv.groups} groups, and a ghost layer computes its channels from all inputs"
    if conv.out_channels < LEAST_CHANNELS:
        return f"has {conv.out_channels} channels, and {LEAST_CHANNELS} are the least that pay"
    if chosen is not None and chosen["ratio"] > conv.out_channels:
        return f"has {conv.out_channels} channels, fewer than its ratio of {chosen['ratio']}"
    if is_compiled(model, site):
        return "is wrapped by torch.compile, which would call it on; compile after convert"
    return own_forward(conv, nn.Conv2d)


def input_shapes(model: nn.Module, inputs: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns for each layer that runs a tensor like its input, of the same strides, filled with ones."""
    seen: dict[str, Tensor] = {}

    def watch(site: str) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            seen[site] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        return before

    with ExitStack() as stack, untouched(model), evaluating(model):
        for site, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(site)).remove)
        run(model, inputs, "Ghost")
    return seen


def put_in(model: nn.Module, site: str, layer: GhostConv2d, norm: str | None) -> None:
    """Puts a ghost layer in the place of a convolution, and an identity in that of the batch norm it takes in."""
    set_module(model, site, layer)
    if norm is not None:
        set_module(model, norm, nn.Identity())


def numbers_of(conv: Any, norm: bool) -> tuple[int, int]:
    """Counts the weights of a convolution, and the other parameters of it and a batch norm behind it."""
    return conv.weight.numel(), conv.out_channels * ((conv.bias is not None) + 2 * norm)


def ghost_numbers(conv: Any, plan: GhostPlan, ratio: int) -> tuple[int, int]:
    """Counts the weights of the ghost layer of a convolution at a ratio, and its other parameters."""
    norm = plan.norm is not None
    made = primary_channels(conv.out_channels, ratio)
    weights = made * conv.weight[0].numel() + made * (ratio - 1) * plan.kernel**2
    biased = made * (1 if norm else ratio) * (conv.bias is not None)
    return weights, biased + 2 * made * ratio * norm


def _norm_of(model: nn.Module, found: Any) -> str | None:
    """Returns the batch norm that a ghost layer can take in."""
    name = found.roles.get("bn")
    return name if name and not found.norm_children and can_split(get_module(model, name)) else None


def _row(
    site: str,
    conv: nn.Conv2d,
    norm: str | None,
    model: nn.Module,
    chosen: Mapping[str, Any],
    config: GhostConfig,
    like: Tensor,
) -> tuple[PlanRow, GhostConv2d, list[Taken]]:
    bn = None if norm is None else get_module(model, norm)
    with torch.random.fork_rng(devices=[], enabled=config.fit):  # a fit leaves nothing of random weights
        layer = GhostConv2d(conv, bn, chosen["ratio"], chosen["kernel"], ordered=config.fit)
    error = None
    if config.fit:
        moments = moments_of_filters(conv, bn, chosen["kernel"])
        fit = fitted(moments, chosen["ratio"])
        write(layer, conv, bn, fit, moments)
        error = error_of(fit, moments)
    for parameter in layer.parameters():
        parameter.requires_grad_(conv.weight.requires_grad)
    taken = _measured([nn.Sequential(conv, *([] if bn is None else [bn])), layer], like)
    detail = f"ratio {chosen['ratio']}, {layer.primary.out_channels} of {conv.out_channels} channels computed, "
    detail += _changes("", *taken) + ("" if error is None else f", error {100 * error:.1f} %")
    kind = type(conv).__name__
    if taken[1].macs >= taken[0].macs and not config.force:
        row = PlanRow(site, kind, "keep", detail, "a ghost layer would take no fewer multiply-adds; force=True")
    elif taken[1].ms > taken[0].ms and not config.force:
        row = PlanRow(site, kind, "keep", detail, "a ghost layer would be slower here; force=True")
    else:
        settings = GhostPlan(chosen["ratio"], chosen["kernel"], norm, config.fit, error)
        row = PlanRow(site, kind, "ghost", detail, "", settings)
    return row, layer, taken


def _changes(what: str, before: Taken, after: Taken) -> str:
    text = (
        f"{before.macs:,} -> {after.macs:,} multiply-adds, {before.nbytes:,} -> {after.nbytes:,} bytes, "
        f"{before.ms:.3f} -> {after.ms:.3f} ms"
    )
    return f"{what}: {text}" if what else text


def _measured(layers: list[nn.Module], like: Tensor) -> list[Taken]:
    """Measures layers on an input of this form, in turns, in eval mode."""
    device = next(layers[0].parameters()).device
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device).fill_(1)
    macs = []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(evaluating(layer))
        timings = time_in_turns([partial(layer, x) for layer in layers], device, SECONDS)
        for layer in layers:
            macs.append(_macs(layer, x))
    nbytes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    return [Taken(m, n, t.p50) for m, n, t in zip(macs, nbytes, timings, strict=True)]


def _macs(layer: nn.Module, x: Tensor) -> int:
    """Counts the multiply-adds of the convolutions in a layer."""
    found = 0

    def after(conv: Any, args: Any, y: Tensor) -> None:
        nonlocal found
        found += y.numel() * conv.weight[0].numel()

    with ExitStack() as stack:
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d):
                stack.callback(conv.register_forward_hook(after).remove)
        layer(x)
    return found
