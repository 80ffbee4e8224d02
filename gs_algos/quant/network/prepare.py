"""Makes live layers fake-quantized by a plan of SimQAT, and gives adds one scale by a plan of SimQAT or SLB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gs_algos.core.modules import get_module
from gs_algos.core.plan import PlanRow
from gs_algos.quant.fake_quant.layers import FakeQuantized, give_output_quantizer, swap_layer
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, WeightQuantizer
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.integer.layers import empty_codes
from gs_algos.quant.network.layer_plan import LayerPlan, join_rows, layer_rows
from gs_algos.quant.network.planning import PlanOptions, Refused
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels.runtime.torch_private import _BatchNorm


@dataclass(frozen=True)
class QuantOptions(PlanOptions):
    """Tells what SimQAT wants of `make_plan` and `swap_layers`; see `SimQATConfig` for the meaning."""

    fold: str
    fusion: bool
    act_delayed: bool
    weight_delayed: bool
    freezable: bool

    who: ClassVar[str] = "SimQAT"
    verb: ClassVar[str] = "quantize"

    def layer(
        self, site: str, layer: nn.Module, bn: tuple[str, nn.Module] | None, chosen: Mapping[str, Any]
    ) -> tuple[LayerPlan, str]:
        weight = Scheme.parse(chosen["weight"], "weight")
        act = None if chosen["act"] is None else Scheme.parse(chosen["act"], "act")
        try:
            n_scales(weight.granularity, layer.weight.shape)  # type: ignore[arg-type, union-attr]
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from error
        # without fusion the output is quantized in front of the batch norm, which so stays where it is
        bn = bn if self.fusion else None
        fold = self.fold if bn else None
        if bn and isinstance(layer, nn.Linear):
            fold = "none"
        if bn and isinstance(bn[1], nn.SyncBatchNorm) and (fold == "two_conv" or self.freezable):
            raise Refused("two_conv and freeze_bn need the batch statistics, which SyncBatchNorm keeps to itself")
        detail = f"weight {weight}" + ("" if act is None else f", act {act}") + (f", fold {fold}" if fold else "")
        plan = LayerPlan(str(weight), None if act is None else str(act), None if bn is None else bn[0], fold=fold)
        return plan, detail

    def nbytes(self, plan: LayerPlan) -> int:
        return empty_codes(plan.shape, Scheme.parse(plan.weight, "weight"), "meta").nbytes


def swap_layers(model: nn.Module, rows: Sequence[PlanRow], options: QuantOptions) -> nn.Module:
    """Swaps the layers that the plan's rows name, on the live model."""
    for row in layer_rows(rows):
        _swap_layer(model, row, options)
    add_join_quantizers(model, rows, options.act_delayed)
    leave_fast_path(model)
    return model


def add_join_quantizers(model: nn.Module, rows: Sequence[PlanRow], delayed: bool = False) -> None:
    """Gives the operands of each add and concat that the rows name one common output quantizer."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for row in join_rows(rows):
        shared = ActivationQuantizer(Scheme.parse(row.settings.act, "act"), device, delayed)
        for operand in [get_module(model, name) for name in row.settings.operands]:
            give_output_quantizer(operand, shared)


def refuse_nonfinite(who: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError if a parameter or buffer of these modules is NaN or Inf; sharded tensors are not looked at."""
    for name, module in modules:
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            whole = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point()
            if whole and not bool(tensor.isfinite().all()):
                raise ValueError(f"{who}: {name}.{key} must be finite, got NaN or Inf")


def _swap_layer(model: nn.Module, row: PlanRow[LayerPlan], options: QuantOptions) -> None:
    layer, plan = get_module(model, row.site), row.settings
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    quantizer = WeightQuantizer(Scheme.parse(plan.weight, "weight"), weight, options.weight_delayed)
    act = None
    if plan.act is not None:
        act = ActivationQuantizer(Scheme.parse(plan.act, "act"), weight.device, options.act_delayed)
    bn = None if plan.bn is None else get_module(model, plan.bn)
    assert bn is None or isinstance(bn, _BatchNorm)
    swap_layer(
        layer,
        quantizer,
        input=act if options.fusion else None,
        output=None if options.fusion else act,
        bn=bn,
        fold=plan.fold or "none",
        freezable=options.freezable,
        norm_children=tuple(get_module(model, name) for name in plan.norm_children),
    )
    assert isinstance(layer, FakeQuantized)
    quantizer.initialize(layer.folded_weight().detach())
