"""Converts searched layers to packed ones: codes and scales, with the batch norm behind them folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.plan import PlanRow
from gs_algos.qat.slb.layers import SearchedLayer
from gs_algos.qat.slb.pact import parse_act
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLayer, QuantizedLinear
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.network.convert import batch_norm_of, output_quantizer_of, prepared_layer, round_bias
from gs_algos.quant.network.layer_plan import LayerPlan
from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.conv_base import conv_rows, geometry_of
from gs_algos.quant.packed.linear import PackedLinear
from gs_algos.quant.packed.module import Packed, PackedFormat
from gs_kernels import PackedWeight


@torch.no_grad()
def packed_layer(model: nn.Module, row: PlanRow[LayerPlan]) -> nn.Module:
    """Makes the converted form of a trained layer from its codes (those of the largest logits if none are chosen)."""
    layer = prepared_layer(model, row.site, SearchedLayer)
    if hasattr(layer.search.logits, "full_tensor"):
        raise RuntimeError(f"convert: {row.site} must have whole logits, got sharded ones; unshard the model first")
    weight, bias = layer.search.packed(), layer.bias
    bn = batch_norm_of(model, row)
    if bn is not None:
        slope, bias = layer.epilogue(bn)
        scale = weight.scale * slope[:, None]
        weight = PackedWeight(weight.codes, scale, weight.zero, None, weight.bits, weight.shape, weight.group_size)
    weight = conv_rows(weight, layer.search.shape[1:])
    output = output_quantizer_of(model, row)
    new = _layer_with(layer, row, weight, None if bias is None else bias.detach().float().clone(), output)
    if isinstance(new, QuantizedLayer) and new.input_quantizer is not None and layer.input_quantizer is not None:
        new.input_quantizer.copy_from(layer.input_quantizer)
        round_bias(new)
    if isinstance(new, QuantizedLayer) and new.output_quantizer is not None:
        new.output_quantizer.copy_from(output)
    return new.eval()


def unfilled_packed_layer(model: nn.Module, row: PlanRow[LayerPlan]) -> nn.Module:
    """Makes a converted layer of the right shapes, its tensors still to be filled."""
    layer = prepared_layer(model, row.site, SearchedLayer)
    grid, device = LevelGrid.parse(row.settings.weight), layer.search.codes.device
    (n, k), bias = layer.search.size, layer.bias is not None or row.settings.bn is not None
    weight = PackedFormat(grid.bits, (n, k), k, grid.zero, "float32").empty(device)
    unfilled = torch.empty(n, dtype=torch.float32, device=device) if bias else None
    new = _layer_with(layer, row, weight, unfilled, output_quantizer_of(model, row))
    if not grid.learned and row.settings.bn is None:  # a batch norm's gamma may turn them around
        new.signs = "positive"
    return new


def _layer_with(
    layer: SearchedLayer, row: PlanRow[LayerPlan], weight: PackedWeight, bias: Tensor | None, output: Any
) -> Packed:
    """Makes a converted layer of a packed weight: an integer one where its input is quantized too.

    output: the trained quantizer of its output, if an add or a concat shares one.
    """
    dtype = torch.float32 if layer.bias is None else layer.bias.dtype
    linear, act = isinstance(layer, nn.Linear), parse_act(row.settings.act)
    if act is not None or output is not None:
        options: dict[str, Any] = {"scheme": layer.search.grid, "bias": bias, "dtype": dtype}
        options |= {"input": None if act is None else act[0], "output": None if output is None else output.scheme}
        if linear:
            return QuantizedLinear(weight, **options)
        return QuantizedConv(geometry_of(layer), layer.search.shape[1:], weight, **options)
    if linear:
        return PackedLinear(weight, bias, dtype)
    return PackedConv(weight, geometry_of(layer), layer.search.shape[1:], bias, dtype)
