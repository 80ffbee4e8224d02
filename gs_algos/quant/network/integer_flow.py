"""Decides what a converted layer does in its own call, an activation or an add, and when it hands int8 on.

Plans are made in steps, each in new rows: `with_consumers` notes what the graph allows, `choose_epilogue` what the
trained network allows, `choose_int8_flow` what the converted one does; `enable_int8_flow` sets the layers accordingly.
A network's outputs are plain tensors. What could run in a layer's call and does not is a note with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gs_algos.core.modules import get_module
from gs_algos.core.plan import PlanRow
from gs_algos.fx.consumers import COMMUTES, consumers, consumers_accept_codes, possible_epilogue
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.op_names import op_of_module
from gs_algos.quant.fake_quant.layers import CONVS, class_given
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLayer
from gs_algos.quant.integer.recorded_forward import record_forwards
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.network.layer_plan import Epilogue, IntegerFlow, LayerPlan, join_rows, layer_rows
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.packed.module import Packed


def with_consumers(graph: SiteGraph, row: PlanRow, sites: Collection[str]) -> PlanRow:
    """Notes in the row of a planned layer what follows it and which layers read its output; other rows stay.

    sites: of all planned layers.
    """
    plan = row.settings
    if not isinstance(plan, LayerPlan):
        return row
    found = possible_epilogue(graph, row.site, [plan.bn] if plan.bn else [])
    behind = [name for name in (plan.bn, *plan.norm_children, found.activation) if name]
    accept = not plan.norm_children and consumers_accept_codes(graph, row.site, behind, sites)
    plan = replace(
        plan,
        epilogue=Epilogue(found.activation, None, found.adds, found.returned, False, found.reason),
        consumers=tuple(consumers(graph, row.site, behind, sites)),
        flow=IntegerFlow(consumers_accept=accept),
    )
    return replace(row, settings=plan)


def int8_inputs(graph: SiteGraph, operands: Sequence[str], sites: Collection[str]) -> tuple[str, ...]:
    """Lists the operands of an add or concat with one scale that may emit int8, whatever reads them."""
    return tuple(name for name in operands if consumers_accept_codes(graph, name, (), sites))


def choose_epilogue(model: nn.Module, row: PlanRow[LayerPlan]) -> PlanRow[LayerPlan]:
    """Decides which activation a trained layer takes over; returns the row that says so."""
    plan = row.settings
    name, reason = plan.epilogue.activation, plan.epilogue.reason
    consumers = plan.consumers
    if not isinstance(get_module(model, row.site), CONVS):
        name, reason = None, ""
    elif name is not None:
        refusal = _refuse_activation(model, row, name)
        if refusal:
            # what reads the output was found behind the activation: it must commute with rounding now
            if op_of_module(get_module(model, name)) not in COMMUTES:
                consumers = ()
            name, reason = None, f"{name} is not fused: {refusal}"
    op = None if name is None else op_of_module(get_module(model, name))
    epilogue = replace(plan.epilogue, activation=name, op=op)
    notes = (reason,) if reason else ()
    return replace(row, settings=replace(plan, epilogue=epilogue, consumers=consumers, notes=notes))


def _refuse_activation(model: nn.Module, row: PlanRow[LayerPlan], name: str) -> str | None:
    act: Any = get_module(model, name)
    layer: Any = get_module(model, row.site)
    bn: Any = get_module(model, row.settings.bn) if row.settings.bn else None
    if row.settings.norm_children:
        return "it is part of a batch norm"
    if layer._forward_hooks or (bn is not None and bn._forward_hooks):
        return "what it reads has hooks"
    if any(getattr(m, "output_quantizer", None) is not None for m in (layer, bn)):
        return "what it reads is quantized first"
    if act._forward_hooks or act._forward_pre_hooks:
        return "it has hooks"
    if getattr(act, "approximate", "none") != "none":
        return f"it is approximated by {act.approximate}"
    own: Any = class_given(act)
    kind: Any = next(cls for cls in own.__mro__ if cls.__module__.startswith("torch.nn."))
    if "forward" in act.__dict__ or own.forward is not kind.forward:
        return f"{own.__name__} has a forward of its own"
    return None


def activation_of(model: nn.Module, row: PlanRow[LayerPlan]) -> nn.Module | None:
    """Returns the activation that the converted layer computes, while it is still in the model."""
    name = row.settings.fused_activation
    return None if name is None else get_module(model, name)


def choose_int8_flow(model: nn.Module, row: PlanRow[LayerPlan]) -> PlanRow[LayerPlan]:
    """Decides whether a converted layer emits int8 and waits for an add; returns the row that says so."""
    layer, plan = get_module(model, row.site), row.settings
    if not isinstance(layer, Convolution):
        return row
    found = [get_module(model, site) for site in plan.consumers]
    integer = isinstance(layer, QuantizedConv) and not layer.integer_refusals(layer.packed.device)
    grid = layer.output_quantizer if isinstance(layer, QuantizedConv) else None
    flow = replace(
        plan.flow,
        to_consumers=_can_emit_int8(layer, found),
        to_own_grid=integer and grid is not None and plan.flow.consumers_accept,
        as_it_lies=bool(found) and all(isinstance(m, Packed) for m in found),
    )
    epilogue, notes = plan.epilogue, plan.notes
    if epilogue.adds:
        rounded = grid is not None or bool(plan.norm_children)
        epilogue = replace(epilogue, defers_add=not rounded and not epilogue.returned and not layer.refusals())
        if grid is not None:
            notes = (*notes, "the add is not fused: its operands are rounded first")
        elif epilogue.returned:
            notes = (*notes, "the add is not fused: the network returns it")
    return replace(row, settings=replace(plan, epilogue=epilogue, flow=flow, notes=notes))


def enable_int8_flow(model: nn.Module, rows: Sequence[PlanRow]) -> None:
    """Makes layers emit int8 to their consumers or on the grids of adds, and wait for the adds behind them.

    A network of convolutions then runs as it is recorded.
    """
    for join in join_rows(rows):
        for name in join.settings.int8_inputs:
            quantizer = getattr(get_module(model, name), "output_quantizer", None)
            if isinstance(quantizer, StaticQuantizer):
                quantizer.emits_int8 = True
    for row in layer_rows(rows):
        layer, plan = get_module(model, row.site), row.settings
        if not isinstance(layer, Convolution):
            continue
        if plan.flow.to_consumers:
            layer.emit_int8_to([get_module(model, site) for site in plan.consumers])  # type: ignore[operator]
        if plan.flow.to_own_grid:
            layer.output_quantizer.emits_int8 = True  # type: ignore[union-attr]
        layer.defers_add, layer.output_as_it_lies = plan.epilogue.defers_add, plan.flow.as_it_lies
        layer.notes = plan.notes
    if any(isinstance(module, Convolution) for module in model.modules()):
        record_forwards(model)


def disable_int8_flow(model: nn.Module, rows: Sequence[PlanRow], reason: str) -> list[PlanRow]:
    """Undoes `enable_int8_flow` for good: every layer gives floats, at once. Returns the rows that say so.

    reason: why, for the notes of the rows.
    """
    for module in model.modules():
        if isinstance(module, StaticQuantizer):
            module.emits_int8 = False
        if isinstance(module, QuantizedLayer):
            module._consumer_grids = ()
        if isinstance(module, Convolution):
            module.output_as_it_lies = False
    new = [_on_floats(row, reason) for row in rows]
    enable_int8_flow(model, new)
    return new


def _on_floats(row: PlanRow, reason: str) -> PlanRow:
    """Changes the row of a layer or an add to floats."""
    plan = row.settings
    if not isinstance(plan, LayerPlan):
        return replace(row, settings=replace(plan, int8_inputs=())) if plan is not None else row
    notes, flow = plan.notes, plan.flow
    if plan.epilogue.defers_add or flow.to_consumers or flow.to_own_grid:
        notes = (*notes, f"hands on floats, at once: {reason}")
    flow = IntegerFlow(consumers_accept=flow.consumers_accept)
    epilogue = replace(plan.epilogue, defers_add=False)
    return replace(row, settings=replace(plan, epilogue=epilogue, flow=flow, notes=notes))


def _can_emit_int8(layer: nn.Module, consumers: Sequence[nn.Module]) -> bool:
    """Says whether all consumers of a converted layer turn its output into the same codes."""
    if not consumers or not isinstance(layer, QuantizedConv) or layer.output_quantizer is not None:
        return False
    if not all(isinstance(m, QuantizedLayer) and not m.integer_refusals(m.packed.device) for m in (layer, *consumers)):
        return False
    grids: list[Any] = [m.input_quantizer for m in consumers]
    return all(grid.same_grid(grids[0]) for grid in grids)
