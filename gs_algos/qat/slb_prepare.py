"""From a site graph to live layers whose weights are searched: which layers, on which grids, why others stay float."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.modules import get_module, own_forward
from gs_algos.core.network import is_compiled
from gs_algos.core.plan import Plan, PlanRow, other_weights, totals_of
from gs_algos.core.rules import Rule, resolve
from gs_algos.fx.borrowed import Borrowed, BorrowedMatmul, turn
from gs_algos.fx.patterns import Match, match
from gs_algos.fx.rewrite import release
from gs_algos.qat.layer_plan import LayerPlan, layer_rows
from gs_algos.qat.link import with_consumers
from gs_algos.qat.prepare import foreign_dtype, keep_row, kind_of, refused_rows, role_text, with_layers
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.packed import PackedFormat
from gs_algos.quant.slb_grid import LevelGrid, default_sharpness, fitted_scale, logits_near, random_logits
from gs_algos.quant.slb_layers import Searched, swap
from gs_algos.quant.slb_pact import act_quantizer, parse_act
from gs_algos.quant.slb_search import LevelSearch

KEYS = "each searched `weight` becomes `search.logits` (a fused layer keeps both): make the optimizer after apply"
UNTOUCHED = object()  # what an option is if no rule sets it
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SearchOptions:
    """What `plan` and `install` need to know; see `SLBConfig` for the meaning."""

    weight: str
    act: str | None
    ends: str | None
    fused: bool
    state_bn: bool
    rules: tuple[Rule, ...]
    horizon: int = 0
    points: int = 0
    logits_dtype: torch.dtype = torch.float32

    def defaults(self) -> dict[str, Any]:
        return {"weight": self.weight, "act": self.act, "fused": self.fused}


def make_plan(algorithm: str, model: nn.Module, example_inputs: Inputs, options: SearchOptions) -> Plan:
    """Reads the model's graph and decides for every Conv and Linear; other weights stay float. Touches nothing.

    Raises:
        ValueError: if the inputs do not run through the model, or a rule matches nothing or cannot be applied.
    """
    args, kwargs = split_inputs(example_inputs)
    model, graph, notes = with_layers(model, args, kwargs)
    matches, refusals = match(graph, model)
    sites = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    found = {site: m for m in matches if (site := m.roles.get("conv") or m.roles.get("linear", "")) in sites}
    settings = _settings(options, sites, [node.module for node in graph.nodes if node.module in found])
    rows = {row.site: row for row in refused_rows(refusals, sites)}
    for site, members in found.items():
        if site not in rows:
            rows[site] = _row(site, sites[site], members, settings[site], model, options)
    for name, layer in sites.items():
        rows.setdefault(name, keep_row(name, layer, "not called on the example inputs"))
    acted = {row.site for row in layer_rows(rows.values())}
    rows = {name: with_consumers(graph, row, acted) for name, row in rows.items()}
    ordered = [rows[name] for name in sites] + [row for row in refused_rows(refusals, {}) if row.site not in sites]
    ordered += other_weights(model, ordered)
    after = {row.site: _nbytes(row.settings.shape, row.settings.weight) for row in layer_rows(ordered)}
    return Plan(algorithm, graph.rung, tuple(ordered), (*notes, KEYS), totals_of(model, after))


def _nbytes(shape: Sequence[int], weight: str) -> int:
    """Bytes of a converted weight of this shape."""
    grid, n, k = LevelGrid.parse(weight), shape[0], math.prod(shape[1:])
    return PackedFormat(grid.bits, (n, k), k, grid.zero, "float32").nbytes


def install(model: nn.Module, rows: Sequence[PlanRow], options: SearchOptions) -> nn.Module:
    """Swaps the layers that the plan's rows name, on the live model. Their logits are zeros until `start`."""
    for row in layer_rows(rows):
        layer: Any = get_module(model, row.site)
        plan, weight = row.settings, layer.weight
        fused, grid = plan.fused_optimizer, LevelGrid.parse(plan.weight)
        search = LevelSearch(
            grid, weight.shape, options.horizon, weight.device, options.logits_dtype, options.points, fused
        )
        search.train(layer.training)
        if not layer._parameters["weight"].requires_grad:  # what was frozen stays frozen
            search.logits.requires_grad_(False)
        bn: Any = get_module(model, plan.bn) if plan.bn else None
        state = bn is not None and options.state_bn
        tail = tuple(get_module(model, name) for name in plan.norm_children)
        turned = fused and isinstance(layer, BorrowedMatmul)  # its optimizer writes weights [N, K]
        if isinstance(layer, Borrowed) and (turned or not fused):  # what takes a parameter's place leaves no owner one
            release(model, layer, ("weight",))
            layer.borrowed = tuple(key for key in layer.borrowed if key != "weight")
        if turned:
            turn(layer)
        swap(layer, search, act_quantizer(plan.act, weight.device), fused, bn, state, tail)
    leave_fast_path(model)
    return model


@torch.no_grad()
def start(layer: Searched, weight: Tensor, bn: _BatchNorm | None, tau: float, init: str, kappa: float | None) -> None:
    """Sets scale and logits of a swapped layer from its float weight, or at random, and its first temperature.

    A grid without a scale leaves the size of the weight to the batch norm behind: bias and statistics follow.
    """
    search = layer.search
    grid, rows = search.grid, weight.detach().flatten(1).float()
    c = fitted_scale(rows if grid.per == "channel" else rows.view(1, -1), grid)  # [O] or [1]
    if init == "random":
        logits = random_logits(search.size, grid).to(rows.device) * tau
    else:
        logits = logits_near(rows, c, grid, default_sharpness(grid) * tau if kappa is None else kappa)
    if search.scale is not None:
        search.scale.copy_(c)
    elif init == "weights" and bn is not None and bn.running_mean is not None and bn.running_var is not None:
        bn.running_mean.div_(c)
        bn.running_var.div_(c.square())
        if layer.bias is not None:
            layer.bias.div_(c)
    search.logits.copy_(logits)
    search.temperature.fill_(tau)
    layer.refresh()


def _settings(
    options: SearchOptions, sites: Mapping[str, nn.Module], called: Sequence[str | None]
) -> dict[str, dict[str, Any] | None]:
    """Per layer: the rules over the defaults; `ends` for the first and last layer, unless a rule is on them."""
    settings = resolve(options.rules, sites, options.defaults(), "SLB")
    if options.ends != "same" and called:
        untouched = dict.fromkeys(options.defaults(), UNTOUCHED)
        ruled = resolve(options.rules, sites, untouched, "SLB")
        for name in (str(called[0]), str(called[-1])):
            if ruled[name] == untouched:
                settings[name] = {**options.defaults(), "weight": options.ends} if options.ends else None
    return settings


def _row(
    site: str, layer: nn.Module, found: Match, settings: dict[str, Any] | None, model: nn.Module, options: SearchOptions
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
    grid, bn, act = LevelGrid.parse(settings["weight"]), found.roles.get("bn"), settings["act"]
    parse_act(act)
    fused = bool(settings["fused"])
    if fused and grid.learned:
        raise ValueError(f"SLB: {site}: a fused optimizer trains logits alone, got the learned scale of {grid}")
    if grid.per == "none" and bn is None:
        raise ValueError(
            f"SLB: {site}: levels from -1 to 1 need a batch norm behind the layer, got {grid} without one; "
            f"use {grid}@channel, for all or by a rule"
        )
    if bn and options.state_bn and isinstance(get_module(model, bn), nn.SyncBatchNorm):
        return keep_row(site, layer, "state batch norm needs the batch statistics, which SyncBatchNorm keeps to itself")
    pattern = " + ".join(role_text(role, name, model) for role, name in found.roles.items())
    logits = f"{grid.planes} logit{'s' if grid.planes > 1 else ''} a weight"
    detail = f"weight {grid}, {logits}" + ("" if act is None else f", act {act}") + (", fused" if fused else "")
    plan = LayerPlan(
        weight=str(grid),
        act=None if act is None else str(act),
        bn=bn,
        norm_children=tuple(found.tail) if bn else (),
        shape=tuple(layer.weight.shape),  # type: ignore[arg-type, union-attr]
        fused_optimizer=fused,
    )
    return PlanRow(site, kind_of(layer), f"search {pattern}", detail, "", plan)
