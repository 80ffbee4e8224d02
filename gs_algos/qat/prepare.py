"""From a site graph to fake-quantized live layers: which layers, with which schemes, and why the others stay float."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.modules import get_module, own_forward
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import Plan, PlanRow, other_weights, totals_of
from gs_algos.core.rules import Rule, resolve
from gs_algos.fx.borrowed import Borrowed
from gs_algos.fx.capture import capture
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.patterns import Match, Refusal, match
from gs_algos.fx.rewrite import functional_scopes, modularize, modularized, try_modularize
from gs_algos.qat.layer_plan import JoinPlan, LayerPlan, join_rows, layer_rows
from gs_algos.qat.link import int8_inputs, with_consumers
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.layers import CONVS, FakeQuantized, give_output_quantizer, swap
from gs_algos.quant.quantized import empty_codes
from gs_algos.quant.quantizers import ActivationQuantizer, WeightQuantizer
from gs_algos.quant.scheme import Scheme, n_scales

LAYERS = (nn.Linear, *CONVS)
JOINS = ("add", "cat")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class QuantOptions:
    """What a quantization-aware algorithm asks of `make_plan` and `install`; see `SimQATConfig` for the meaning."""

    weight: str
    act: str | None
    fold: str
    fusion: bool
    act_delayed: bool
    weight_delayed: bool
    freezable: bool
    rules: tuple[Rule, ...]


def make_plan(algorithm: str, model: nn.Module, example_inputs: Inputs, options: QuantOptions) -> Plan:
    """Reads the model's graph and decides for every Conv and Linear; other weights stay float. Touches nothing.

    Raises:
        ValueError: if the inputs do not run through the model, or a rule matches nothing or cannot be applied.
    """
    args, kwargs = split_inputs(example_inputs)
    model, graph, notes = with_layers(model, args, kwargs)
    matches, refusals = match(graph, model)
    sites = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    settings = resolve(options.rules, sites, {"weight": options.weight, "act": options.act}, algorithm)
    rows = {row.site: row for row in refused_rows(refusals, sites)}
    for found in matches:
        site = found.roles.get("conv") or found.roles.get("linear")
        if site is not None and site in sites and site not in rows:
            rows[site] = _layer_row(site, sites[site], found, settings[site], model, options)
    for name, layer in sites.items():
        if name not in rows:
            rows[name] = keep_row(name, layer, "not called on the example inputs")
    acted = {row.site for row in layer_rows(rows.values())}
    rows = {name: with_consumers(graph, row, acted) for name, row in rows.items()}
    quantized = {name for found in matches if _acts(found, rows) for name in found.roles.values()}
    joins = [
        _join_row(pattern, operands, quantized, options, graph, acted) for pattern, operands in _join_groups(matches)
    ]
    ordered = [rows[name] for name in sites] + [row for row in refused_rows(refusals, {}) if row.site not in sites]
    ordered += other_weights(model, ordered)
    after = {row.site: _nbytes(row.settings.shape, row.settings.weight) for row in layer_rows(ordered)}
    return Plan(algorithm, graph.rung, tuple(ordered + joins), notes, totals_of(model, after))


def _nbytes(shape: Sequence[int], weight: str) -> int:
    """Bytes of a converted weight of this shape."""
    return empty_codes(shape, Scheme.parse(weight, "weight"), "meta").nbytes


def with_layers(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, SiteGraph, tuple[str, ...]]:
    """(model, its graph, notes) for a plan. A model with functional calls is copied, and layers made for them.

    The notes say why a tracer failed, and why some calls cannot be replaced.
    """
    graph = capture(model, args, kwargs)
    if not functional_scopes(graph, model):
        return model, graph, graph.notes
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = f"functional layers stay float: the model cannot be copied for the plan: {error}"
        return model, graph, (*graph.notes, why)
    twin, failures = try_modularize(twin, args, kwargs)
    graph = capture(twin, args, kwargs)
    return twin, graph, (*graph.notes, *failures)


def with_planned_layers(
    model: nn.Module, plan: Plan, example_inputs: Inputs
) -> tuple[nn.Module, list[tuple[str, dict[str, Any]]]]:
    """The live model with the layers that a plan has found in functional calls, and what `modularize_again` needs."""
    known = modularized(model)
    if any(row.kind.startswith("F.") for row in plan.acted()):
        model = modularize(model, *split_inputs(example_inputs))
    return model, [item for item in modularized(model) if item not in known]


def install(model: nn.Module, rows: Sequence[PlanRow], options: QuantOptions) -> nn.Module:
    """Swaps the layers that the plan's rows name, on the live model."""
    for row in layer_rows(rows):
        _install_layer(model, row, options)
    for join in join_rows(rows):
        _install_join(model, join, options)
    leave_fast_path(model)
    return model


def refuse_nonfinite(who: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError if a parameter or buffer of these modules is NaN or Inf; sharded tensors are not looked at."""
    for name, module in modules:
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            whole = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point()
            if whole and not bool(tensor.isfinite().all()):
                raise ValueError(f"{who}: {name}.{key} must be finite, got NaN or Inf")


def foreign_dtype(layer: nn.Module) -> str:
    """Why no grid can be trained for the weight of a layer in its dtype; empty if one can."""
    found = str(layer.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    words = f"its weight is {found}, and must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}: call net.float() first"
    return "" if found in DTYPES else words


def keep_row(site: str, layer: nn.Module | None, reason: str) -> PlanRow:
    """The row of a layer that stays float."""
    return PlanRow(site, kind_of(layer), "keep", reason=reason)


def kind_of(layer: nn.Module | None) -> str:
    """The class of a layer as the plan shows it; that of the function for one which stands for a functional call."""
    name = type(layer).__name__ if layer is not None else "function"
    return f"F.{name.removeprefix('Borrowed').lower()}" if isinstance(layer, Borrowed) else name


def refused_rows(refusals: list[Refusal], sites: Mapping[str, nn.Module]) -> list[PlanRow]:
    """One row per refused layer (or, with no sites given, per refused function and join), reasons joined."""
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        if not sites or refusal.site in sites:
            reasons.setdefault(refusal.site, []).append(refusal.reason)
    return [keep_row(site, sites.get(site), "; ".join(dict.fromkeys(why))) for site, why in reasons.items()]


def _layer_row(
    site: str, layer: nn.Module, found: Match, settings: dict[str, Any] | None, model: nn.Module, options: QuantOptions
) -> PlanRow:
    if settings is None or settings["weight"] is None:
        return keep_row(site, layer, "left float by a rule")
    if is_compiled(model, site):
        return keep_row(site, layer, "is wrapped by torch.compile, which calls the float layer; compile after convert")
    base = next((kind for kind in LAYERS if isinstance(layer, kind)), nn.Module)
    if reason := own_forward(layer, base):
        return keep_row(site, layer, reason)
    if foreign_dtype(layer):
        return keep_row(site, layer, foreign_dtype(layer))
    weight = Scheme.parse(settings["weight"], "weight")
    act = None if settings["act"] is None else Scheme.parse(settings["act"], "act")
    try:
        n_scales(weight.granularity, layer.weight.shape)  # type: ignore[arg-type, union-attr]
    except ValueError as error:
        raise ValueError(f"{site}: {error}") from error
    # without fusion the output is quantized in front of the batch norm, which so stays where it is
    bn = found.roles.get("bn") if options.fusion else None
    fold = options.fold if bn else None
    if bn and isinstance(layer, nn.Linear) and fold != "none":
        fold = "none"
    if bn and isinstance(get_module(model, bn), nn.SyncBatchNorm) and (fold == "two_conv" or options.freezable):
        return keep_row(
            site, layer, "two_conv and freeze_bn need the batch statistics, which SyncBatchNorm keeps to itself"
        )
    pattern = " + ".join(role_text(role, name, model) for role, name in found.roles.items())
    detail = f"weight {weight}" + ("" if act is None else f", act {act}") + (f", fold {fold}" if fold else "")
    return PlanRow(
        site,
        kind_of(layer),
        f"quantize {pattern}",
        detail,
        "",
        LayerPlan(
            weight=str(weight),
            act=None if act is None else str(act),
            bn=bn,
            norm_children=tuple(found.tail) if bn else (),
            shape=tuple(layer.weight.shape),  # type: ignore[arg-type, union-attr]
            fold=fold,
        ),
    )


def role_text(role: str, name: str, model: nn.Module) -> str:
    """A member of a pattern as the plan shows it."""
    return name[2:] if name.startswith("F.") else kind_of(get_module(model, name))


def _join_groups(matches: list[Match]) -> list[tuple[str, tuple[str | None, ...]]]:
    """(pattern, operands) of every add and concat; those that read a common module share one scale and become one."""
    groups: list[tuple[str, tuple[str | None, ...]]] = []
    for found in (m for m in matches if m.pattern in JOINS):
        pattern, operands = found.pattern, tuple(dict.fromkeys(found.operands))
        if None not in operands:
            joined = [g for g in groups if None not in g[1] and set(g[1]) & set(operands)]
            for other in joined:
                groups.remove(other)
                operands = tuple(dict.fromkeys((*other[1], *operands)))
        groups.append((pattern, operands))
    return groups


def _acts(found: Match, rows: Mapping[str, PlanRow]) -> bool:
    """True if the layer of this match is planned to be quantized."""
    row = rows.get(found.roles.get("conv") or found.roles.get("linear") or "")
    return row is not None and row.action != "keep"


def _join_row(
    pattern: str,
    operands: tuple[str | None, ...],
    quantized: set[str],
    options: QuantOptions,
    graph: SiteGraph,
    acted: set[str],
) -> PlanRow:
    """An add or concat whose operands can share one scale, or why they cannot. quantized: layers and what follows."""
    site = f"{pattern} of {', '.join(name or 'a function' for name in operands)}"
    if options.act is None:
        return PlanRow(site, pattern, "keep", reason="activations are not quantized")
    known = tuple(name for name in operands if name is not None)
    if len(known) < len(operands):
        return PlanRow(site, pattern, "keep", reason="an operand comes from a function: no module to quantize it in")
    if quantized.isdisjoint(operands):
        return PlanRow(site, pattern, "keep", reason="no operand comes from a quantized layer")
    scheme = Scheme.parse(options.act, "act")
    detail = f"act {scheme}, one scale for {len(operands)} operands"
    plan = JoinPlan(known, str(scheme), int8_inputs(graph, known, acted))
    return PlanRow(site, pattern, "share scale", detail, "", plan)


def _install_layer(model: nn.Module, row: PlanRow[LayerPlan], options: QuantOptions) -> None:
    layer, plan = get_module(model, row.site), row.settings
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    quantizer = WeightQuantizer(Scheme.parse(plan.weight, "weight"), weight, options.weight_delayed)
    act = None
    if plan.act is not None:
        act = ActivationQuantizer(Scheme.parse(plan.act, "act"), weight.device, options.act_delayed)
    bn = None if plan.bn is None else get_module(model, plan.bn)
    assert bn is None or isinstance(bn, _BatchNorm)
    swap(
        layer,
        quantizer,
        input=act if options.fusion else None,
        output=None if options.fusion else act,
        bn=bn,
        fold=plan.fold or "none",
        freezable=options.freezable,
        tail=tuple(get_module(model, name) for name in plan.norm_children),
    )
    assert isinstance(layer, FakeQuantized)
    quantizer.initialise(layer.folded_weight().detach())


def _install_join(model: nn.Module, row: PlanRow[JoinPlan], options: QuantOptions) -> None:
    scheme = Scheme.parse(row.settings.act, "act")
    operands = [get_module(model, name) for name in row.settings.operands]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shared = ActivationQuantizer(scheme, device, options.act_delayed)
    for operand in operands:
        give_output_quantizer(operand, shared)
