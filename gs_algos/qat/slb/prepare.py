"""Plans which layers are searched, on which grids, and why others stay float; swaps the planned ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import get_module
from gs_algos.core.plan import PlanRow
from gs_algos.fx.modularize.functional_calls import release
from gs_algos.fx.modularize.shared_parameters import Borrowed, BorrowedMatmul, turn
from gs_algos.qat.slb.layers import SearchedLayer, swap
from gs_algos.qat.slb.pact import act_quantizer, parse_act
from gs_algos.qat.slb.search import LevelSearch
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.level_grid import LevelGrid, default_sharpness, fitted_scale, logits_near, random_logits
from gs_algos.quant.network.layer_plan import LayerPlan, layer_rows
from gs_algos.quant.network.planning import PlanOptions, Refused
from gs_algos.quant.network.prepare import add_join_quantizers
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.scheme import Scheme
from gs_kernels.runtime.torch_private import _BatchNorm

KEYS = "each searched `weight` becomes `search.logits` (a fused layer keeps both): make the optimizer after apply"
UNTOUCHED = object()  # what an option is if no rule sets it


@dataclass(frozen=True)
class SearchOptions(PlanOptions):
    """Options of `make_plan` and `install` for SLB; see `SLBConfig` for the meaning."""

    ends: str | None
    fused: bool
    state_bn: bool
    total_steps: int = 0
    points: int = 0
    logits_dtype: torch.dtype = torch.float32

    who: ClassVar[str] = "SLB"
    verb: ClassVar[str] = "search"
    notes: ClassVar[tuple[str, ...]] = (KEYS,)

    def defaults(self) -> dict[str, Any]:
        return {**super().defaults(), "fused": self.fused}

    def chosen(self, sites: Mapping[str, nn.Module], called: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """Returns each layer's options: rules over defaults; `ends` for the first and last, unless a rule sets it."""
        chosen = super().chosen(sites, called)
        if self.ends != "same" and called:
            untouched = dict.fromkeys(self.defaults(), UNTOUCHED)
            ruled = resolve(self.rules, sites, untouched, self.who)
            for name in (called[0], called[-1]):
                if ruled[name] == untouched:
                    chosen[name] = {**self.defaults(), "weight": self.ends} if self.ends else None
        return chosen

    def layer(
        self, site: str, layer: nn.Module, bn: tuple[str, nn.Module] | None, chosen: Mapping[str, Any]
    ) -> tuple[LayerPlan, str]:
        grid, act, fused = LevelGrid.parse(chosen["weight"]), chosen["act"], bool(chosen["fused"])
        parse_act(act)
        if fused and grid.learned:
            raise ValueError(f"SLB: {site}: a fused optimizer trains logits alone, got the learned scale of {grid}")
        if grid.per == "none" and bn is None:
            raise ValueError(
                f"SLB: {site}: levels from -1 to 1 need a batch norm behind the layer, got {grid} without one; "
                f"use {grid}@channel, for all or by a rule"
            )
        if bn and self.state_bn and isinstance(bn[1], nn.SyncBatchNorm):
            raise Refused("state batch norm needs the batch statistics, which SyncBatchNorm keeps to itself")
        logits = f"{grid.planes} logit{'s' if grid.planes > 1 else ''} a weight"
        detail = f"weight {grid}, {logits}" + ("" if act is None else f", act {act}") + (", fused" if fused else "")
        name = None if bn is None else bn[0]
        return LayerPlan(str(grid), None if act is None else str(act), name, fused_optimizer=fused), detail

    def nbytes(self, plan: LayerPlan) -> int:
        grid, n, k = LevelGrid.parse(plan.weight), plan.shape[0], math.prod(plan.shape[1:])
        return PackedFormat(grid.bits, (n, k), k, grid.zero, "float32").nbytes

    def join_scheme(self, ruled: Collection[str]) -> Scheme:
        parsed = parse_act(self.act)
        if not ruled and parsed is not None and parsed[1]:
            raise Refused("the bound that :pact learns belongs to one layer's input, and cannot be shared")
        return super().join_scheme(ruled)


def install(model: nn.Module, rows: Sequence[PlanRow], options: SearchOptions) -> nn.Module:
    """Swaps the layers that the plan's rows name, on the live model. Their logits are zeros until `start`."""
    for row in layer_rows(rows):
        layer: Any = get_module(model, row.site)
        plan, weight = row.settings, layer.weight
        fused, grid = plan.fused_optimizer, LevelGrid.parse(plan.weight)
        search = LevelSearch(
            grid, weight.shape, options.total_steps, weight.device, options.logits_dtype, options.points, fused
        )
        search.train(layer.training)
        if not layer._parameters["weight"].requires_grad:  # what was frozen stays frozen
            search.logits.requires_grad_(False)
        bn: Any = get_module(model, plan.bn) if plan.bn else None
        state = bn is not None and options.state_bn
        norm_children = tuple(get_module(model, name) for name in plan.norm_children)
        turned = fused and isinstance(layer, BorrowedMatmul)  # its optimizer writes weights [N, K]
        if isinstance(layer, Borrowed) and (turned or not fused):  # what takes a parameter's place leaves no owner one
            release(model, layer, ("weight",))
            layer.borrowed = tuple(key for key in layer.borrowed if key != "weight")
        if turned:
            turn(layer)
        swap(layer, search, act_quantizer(plan.act, weight.device), fused, bn, state, norm_children)
    add_join_quantizers(model, rows)
    leave_fast_path(model)
    return model


@torch.no_grad()
def start(
    layer: SearchedLayer, weight: Tensor, bn: _BatchNorm | None, tau: float, init: str, kappa: float | None
) -> None:
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
