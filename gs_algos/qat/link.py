"""What a converted layer's call does beside the layer, and in which form it hands its output on.

A plan's rows say what the graph allows (`add_readers`); `decide` what the trained network allows, which a checkpoint
keeps; `link` makes it so. What a network returns is a plain tensor. Whatever could run in a layer's call and does not
is a note with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from gs_algos.core.modules import get_module
from gs_algos.core.plan import PlanRow
from gs_algos.fx.exact import COMMUTES, follows, readers, takes_codes
from gs_algos.fx.graph import SiteGraph
from gs_algos.fx.ops import op_of_module
from gs_algos.quant.convolution import Convolution
from gs_algos.quant.layers import CONVS, class_given
from gs_algos.quant.packed import Packed
from gs_algos.quant.quantized import QuantizedConv, QuantizedLayer
from gs_algos.quant.static_quantizer import StaticQuantizer


def add_readers(graph: SiteGraph, rows: Mapping[str, PlanRow]) -> None:
    """Says in each quantized layer's settings what follows it, and who reads what it gives."""
    acted = {site: row for site, row in rows.items() if row.action != "keep"}
    for site, row in acted.items():
        tail, bn = row.settings["tail"], row.settings["bn"]
        found = follows(graph, site, [bn] if bn else [])
        behind = [name for name in (bn, *tail, found.activation) if name]
        row.settings["follows"] = asdict(found)
        row.settings["readers"] = readers(graph, site, behind, acted)
        row.settings["takes_codes"] = not tail and takes_codes(graph, site, behind, acted)


def add_operands(graph: SiteGraph, rows: Mapping[str, PlanRow], joins: Sequence[PlanRow]) -> None:
    """Says of each add and concat with one scale which of its operands may give codes, for all that read them."""
    acted = [site for site, row in rows.items() if row.action != "keep"]
    for join in joins:
        if join.action != "keep":
            operands = join.settings["operands"]
            join.settings["take_codes"] = [name for name in operands if takes_codes(graph, name, (), acted)]


def decide(model: nn.Module, row: PlanRow) -> None:
    """Whether a trained layer takes over the activation behind it, before it is converted; into the row's settings."""
    found = row.settings.get("follows", {})
    name, reason = found.get("activation"), found.get("reason", "")
    if not isinstance(get_module(model, row.site), CONVS):
        name, reason = None, ""
    elif name is not None:
        refusal = _refuse_activation(model, row, name)
        if refusal:
            # what reads the output was found behind the activation: it must commute with rounding now
            if op_of_module(get_module(model, name)) not in COMMUTES:
                row.settings["readers"] = []
            name, reason = None, f"{name} is not fused: {refusal}"
    row.settings["fused"] = None if name is None else [name, op_of_module(get_module(model, name))]
    row.settings["notes"] = [reason] if reason else []


def _refuse_activation(model: nn.Module, row: PlanRow, name: str) -> str | None:
    act: Any = get_module(model, name)
    layer: Any = get_module(model, row.site)
    bn: Any = get_module(model, row.settings["bn"]) if row.settings["bn"] else None
    if row.settings["tail"]:
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


def activation_of(model: nn.Module, row: PlanRow) -> nn.Module | None:
    """The module whose work the converted layer does, while it is still there."""
    return get_module(model, row.settings["fused"][0]) if row.settings.get("fused") else None


def decide_codes(model: nn.Module, rows: Sequence[PlanRow]) -> None:
    """Which converted layers hand on codes, and which wait for an add; into the rows' settings."""
    for row in rows:
        layer = get_module(model, row.site)
        if not isinstance(layer, Convolution):
            continue
        row.settings["hands_codes"] = _can_hand(model, row)
        found = [get_module(model, site) for site in row.settings.get("readers", ())]
        row.settings["hands_values"] = bool(found) and all(isinstance(m, Packed) for m in found)
        integer = isinstance(layer, QuantizedConv) and not layer.integer_refusals(layer.packed.device)
        grid = layer.output_quantizer if isinstance(layer, QuantizedConv) else None
        row.settings["hands_own"] = integer and grid is not None and bool(row.settings.get("takes_codes"))
        if row.settings.get("follows", {}).get("adds"):
            rounded = grid is not None or row.settings["tail"]
            returned = row.settings["follows"].get("returned", False)
            row.settings["defers"] = not rounded and not returned and not layer.refusals()
            if grid is not None:
                row.settings["notes"].append("the add is not fused: its operands are rounded first")
            elif returned:
                row.settings["notes"].append("the add is not fused: the network returns it")


def link(model: nn.Module, rows: Sequence[PlanRow]) -> None:
    """Lets layers hand codes to their readers, give codes on the grids of adds, and wait for the adds behind them."""
    for row in rows:
        for name in row.settings.get("take_codes", ()):
            quantizer = getattr(get_module(model, name), "output_quantizer", None)
            if isinstance(quantizer, StaticQuantizer):
                quantizer.hands = True
        layer = get_module(model, row.site) if row.action != "keep" and "bn" in row.settings else None
        if not isinstance(layer, Convolution):
            continue
        if row.settings.get("hands_codes"):
            layer.hand_to([get_module(model, site) for site in row.settings["readers"]])  # type: ignore[operator]
        if row.settings.get("hands_own"):
            layer.output_quantizer.hands = True  # type: ignore[union-attr]
        layer.deferred, layer.hands = bool(row.settings.get("defers")), bool(row.settings.get("hands_values"))
        layer.notes = tuple(row.settings.get("notes", ()))


def unlink(model: nn.Module, rows: Sequence[PlanRow], reason: str) -> None:
    """Undoes `link` for good: every layer gives floats, at once; reason: for the notes."""
    for module in model.modules():
        if isinstance(module, StaticQuantizer):
            module.hands = False
        if isinstance(module, QuantizedLayer):
            module._handed = ()
        if isinstance(module, Convolution):
            module.hands = False
    for row in rows:
        if row.settings.get("defers") or row.settings.get("hands_codes") or row.settings.get("hands_own"):
            row.settings["notes"].append(f"hands on floats, at once: {reason}")
        row.settings.update(hands_codes=False, hands_own=False, hands_values=False, defers=False, take_codes=[])
    link(model, rows)


def _can_hand(model: nn.Module, row: PlanRow) -> bool:
    """Whether all that read a converted layer's output turn it into the same codes."""
    layer = get_module(model, row.site)
    found = [get_module(model, site) for site in row.settings.get("readers", ())]
    if not found or not isinstance(layer, QuantizedConv) or layer.output_quantizer is not None:
        return False
    if not all(isinstance(m, QuantizedLayer) and not m.integer_refusals(m.packed.device) for m in (layer, *found)):
        return False
    grids: list[Any] = [m.input_quantizer for m in found]
    return all(grid.same_grid(grids[0]) for grid in grids)
