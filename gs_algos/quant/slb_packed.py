"""Packed layers that quantize their input: what a trained layer with activation quantization becomes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gs_algos.quant.layers import swapped_class
from gs_algos.quant.packed import Packed
from gs_algos.quant.packed_conv import PackedConv
from gs_algos.quant.quantized import StaticQuantizer


class _QuantizedInput(nn.Module):
    prefix = "QuantizedInput"
    input_quantizer: StaticQuantizer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input_quantizer(x))


def give_input_quantizer(layer: Packed, quantizer: StaticQuantizer | None) -> Packed:
    """The packed layer itself, which from now on quantizes its input first; None leaves it as it is."""
    if quantizer is not None:
        layer.__class__ = swapped_class(_QuantizedInput, type(layer))
        layer.input_quantizer = quantizer
    return layer


def path_of(layer: Packed) -> str:
    """Which arithmetic a packed layer runs in."""
    rows: Any = getattr(layer, "input_quantizer", None)
    act = "float rows" if rows is None else f"rows rounded to {rows.scheme.bits} bits, multiplied in float"
    refusals = layer.refusals() if isinstance(layer, PackedConv) else []
    return f"dequantizes: {', '.join(refusals)}; {act}" if refusals else f"packed codes, {act}"
