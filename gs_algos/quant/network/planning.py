"""Plans which layers of a graph are quantized or searched, and says why the others stay float.

SimQAT and SLB plan alike. They differ in `PlanOptions`: the grids they know, and what they refuse.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.layer_rules import Rule, resolve
from gs_algos.core.modules import get_module, own_forward
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import Plan, PlanRow, other_weights, totals_of
from gs_algos.fx.capture.capture import capture
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.modularize.functional_calls import functional_scopes, modularize, modularized, try_modularize
from gs_algos.fx.modularize.shared_parameters import Borrowed
from gs_algos.fx.patterns import Match, Refusal, match
from gs_algos.quant.fake_quant.layers import CONVS
from gs_algos.quant.network.integer_flow import int8_inputs, with_consumers
from gs_algos.quant.network.layer_plan import JoinPlan, LayerPlan, join_rows, layer_rows
from gs_algos.quant.scheme import Scheme

LAYERS = (nn.Linear, *CONVS)
JOINS = ("add", "cat")
DTYPES = ("float32", "float16", "bfloat16")


class Refused(Exception):
    """Says why a layer stays float."""


@dataclass(frozen=True)
class PlanOptions(ABC):
    """Tells `make_plan` what an algorithm wants of each layer.

    Args:
        weight: the grid of every weight that no rule is on.
        act: the scheme of what layers read; None: floats.
        rules: as everywhere.

    verb: what is done to a layer, as the plan says it.
    """

    weight: str
    act: str | None
    rules: tuple[Rule, ...]

    who: ClassVar[str]
    verb: ClassVar[str]
    notes: ClassVar[tuple[str, ...]] = ()

    def defaults(self) -> dict[str, Any]:
        """Returns what a rule may set, with the values where no rule does.

        join: the scheme of an add or concat that reads the output of the layer or of what follows it; None: `act`.
        """
        return {"weight": self.weight, "act": self.act, "join": None}

    def chosen(self, sites: Mapping[str, nn.Module], called: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """Returns the options of each layer; None: a rule leaves it float. called: the layers that run, in order."""
        return resolve(self.rules, sites, self.defaults(), self.who)

    @abstractmethod
    def layer(
        self, site: str, layer: nn.Module, bn: tuple[str, nn.Module] | None, chosen: Mapping[str, Any]
    ) -> tuple[LayerPlan, str]:
        """Plans one layer; returns its plan, and the text of its row.

        Args:
            bn: name and module of the batch norm behind it.
            chosen: its options.

        Raises:
            Refused: if it stays float.
            ValueError: if an option does not fit it.
        """

    @abstractmethod
    def nbytes(self, plan: LayerPlan) -> int:
        """Returns the bytes of the converted weight."""

    def join_scheme(self, ruled: Collection[str]) -> Scheme:
        """Returns the scheme that the operands of an add or a concat share.

        ruled: schemes that rules give to it; the one with most bits is taken.

        Raises:
            Refused: if the operands stay as they are.
        """
        if ruled:
            return max((Scheme.parse(scheme, "act") for scheme in ruled), key=lambda scheme: scheme.bits)
        if self.act is None:
            raise Refused("activations are not quantized")
        return Scheme.parse(self.act, "act")


def make_plan(algorithm: str, model: nn.Module, example_inputs: Inputs, options: PlanOptions) -> Plan:
    """Reads the model's graph and decides for every Conv and Linear; other weights stay float. Touches nothing.

    Raises:
        ValueError: if the inputs do not run through the model, or a rule matches nothing or cannot be applied.
    """
    args, kwargs = split_inputs(example_inputs)
    model, graph, notes = with_layers(model, args, kwargs)
    matches, refusals = match(graph, model)
    sites = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    found = {site: m for m in matches if (site := _layer_of(m)) in sites}
    called = [node.module for node in graph.nodes if node.module is not None and node.module in found]
    chosen = options.chosen(sites, called)
    rows: dict[str, PlanRow] = {row.site: row for row in refused_rows(refusals, sites)}
    for site, members in found.items():
        if site not in rows:
            rows[site] = _layer_row(site, sites[site], members, chosen[site], model, options)
    for name, layer in sites.items():
        rows.setdefault(name, keep_row(name, layer, "not called on the example inputs"))
    acted = {row.site for row in layer_rows(rows.values())}
    rows = {name: with_consumers(graph, row, acted) for name, row in rows.items()}
    quantized = {name: chosen[site] or {} for site, m in found.items() if site in acted for name in m.roles.values()}
    joins = [_join_row(pattern, names, quantized, graph, acted, options) for pattern, names in _join_groups(matches)]
    _refuse_idle_joins(quantized, [name for row in join_rows(joins) for name in row.settings.operands], options.who)
    ordered = [rows[name] for name in sites] + [row for row in refused_rows(refusals, {}) if row.site not in sites]
    ordered += other_weights(model, ordered)
    after = {row.site: options.nbytes(row.settings) for row in layer_rows(ordered)}
    return Plan(algorithm, graph.tracer, tuple(ordered + joins), (*notes, *options.notes), totals_of(model, after))


def with_layers(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, SiteGraph, tuple[str, ...]]:
    """Returns (model, its graph, notes) for a plan; a model with functional calls is copied, and layers made for them.

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
    """Makes layers of the functional calls of a plan, in the live model; also returns what `modularize_again` needs."""
    known = modularized(model)
    if any(row.kind.startswith("F.") for row in plan.acted()):
        model = modularize(model, *split_inputs(example_inputs))
    return model, [item for item in modularized(model) if item not in known]


def foreign_dtype(layer: nn.Module) -> str:
    """Says why no grid can be trained for a weight of this dtype; empty if one can."""
    dtype = str(layer.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    reason = f"its weight is {dtype}, and must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}: call net.float() first"
    return "" if dtype in DTYPES else reason


def keep_row(site: str, layer: nn.Module | None, reason: str) -> PlanRow:
    """Makes the row of a layer that stays float."""
    return PlanRow(site, kind_of(layer), "keep", reason=reason)


def kind_of(layer: nn.Module | None) -> str:
    """Names the class of a layer as the plan shows it; the function, for a layer made from a functional call."""
    name = type(layer).__name__ if layer is not None else "function"
    return f"F.{name.removeprefix('Borrowed').lower()}" if isinstance(layer, Borrowed) else name


def refused_rows(refusals: list[Refusal], sites: Mapping[str, nn.Module]) -> list[PlanRow]:
    """Makes one row per refused layer (or, with no sites given, per refused function and join), reasons joined."""
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        if not sites or refusal.site in sites:
            reasons.setdefault(refusal.site, []).append(refusal.reason)
    return [keep_row(site, sites.get(site), "; ".join(dict.fromkeys(why))) for site, why in reasons.items()]


def _layer_of(found: Match) -> str:
    """Names the layer of a match; "" if it has none."""
    return found.roles.get("conv") or found.roles.get("linear", "")


def _layer_row(
    site: str, layer: nn.Module, found: Match, chosen: dict[str, Any] | None, model: nn.Module, options: PlanOptions
) -> PlanRow:
    if chosen is None or chosen["weight"] is None:
        return keep_row(site, layer, "left float by a rule")
    if is_compiled(model, site):
        return keep_row(site, layer, "is wrapped by torch.compile, which calls the float layer; compile after convert")
    base = next((kind for kind in LAYERS if isinstance(layer, kind)), nn.Module)
    reason = own_forward(layer, base) or foreign_dtype(layer)
    if reason:
        return keep_row(site, layer, reason)
    name = found.roles.get("bn")
    try:
        plan, detail = options.layer(site, layer, None if name is None else (name, get_module(model, name)), chosen)
    except Refused as refusal:
        return keep_row(site, layer, str(refusal))
    shape: Any = layer.weight.shape  # type: ignore[union-attr]
    plan = replace(plan, shape=tuple(shape), norm_children=tuple(found.norm_children) if plan.bn else ())
    pattern = " + ".join(_role_text(role, name, model) for role, name in found.roles.items())
    return PlanRow(site, kind_of(layer), f"{options.verb} {pattern}", detail, "", plan)


def _role_text(role: str, name: str, model: nn.Module) -> str:
    """Names a member of a pattern as the plan shows it."""
    return name[2:] if name.startswith("F.") else kind_of(get_module(model, name))


def _refuse_idle_joins(quantized: Mapping[str, Mapping[str, Any]], operands: Sequence[str], who: str) -> None:
    """Raises ValueError if rules set `join` for layers none of which an add or a concat with one scale reads."""
    ruled = [name for name, options in quantized.items() if options.get("join") is not None]
    if ruled and set(ruled).isdisjoint(operands):
        raise ValueError(
            f"{who}: a rule that sets join must match a layer in front of an add or a concat with one scale, got "
            f"{', '.join(ruled[:4])}; the plan lists them as 'share scale'"
        )


def _join_groups(matches: list[Match]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Groups adds and concats, (pattern, operands): those that read a common module become one."""
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


def _join_row(
    pattern: str,
    operands: tuple[str | None, ...],
    quantized: Mapping[str, Mapping[str, Any]],
    graph: SiteGraph,
    acted: Collection[str],
    options: PlanOptions,
) -> PlanRow:
    """Makes the row of an add or concat whose operands can share one scale, or that says why they cannot.

    quantized: layers and what follows them, with the options of the layer; acted: the layers alone.
    """
    site = f"{pattern} of {', '.join(name or 'a function' for name in operands)}"
    known = tuple(name for name in operands if name is not None)
    ruled = [scheme for name in known if (scheme := quantized.get(name, {}).get("join")) is not None]
    try:
        scheme = options.join_scheme(ruled)
    except Refused as refusal:
        return PlanRow(site, pattern, "keep", reason=str(refusal))
    if len(known) < len(operands):
        return PlanRow(site, pattern, "keep", reason="an operand comes from a function: no module to quantize it in")
    if set(quantized).isdisjoint(known):
        return PlanRow(site, pattern, "keep", reason="no operand comes from a quantized layer")
    plan = JoinPlan(known, str(scheme), int8_inputs(graph, known, acted))
    return PlanRow(site, pattern, "share scale", f"act {scheme}, one scale for {len(known)} operands", "", plan)
