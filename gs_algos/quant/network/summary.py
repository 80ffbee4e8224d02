"""Renders the summary of a quantized network: a table with one row per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gs_algos.core.plan import render_layers
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.integer.layers import QuantizedLayer


def summary_of(model: nn.Module) -> str:
    """Renders a table of a model's quantized layers, prepared or converted, with bytes and the arithmetic of each."""

    def row(module: nn.Module) -> tuple[Any, ...] | None:
        if isinstance(module, FakeQuantized):
            act = module.input_quantizer or module.output_quantizer
            scheme, act_scheme = module.weight_quantizer.scheme, act.scheme if act else "float"
            return str(scheme), act_scheme, "", "fake-quant in float", ""
        if isinstance(module, QuantizedLayer):
            quantizer = module.input_quantizer or module.output_quantizer
            act_scheme = quantizer.scheme if quantizer else "float"
            notes = "; ".join(getattr(module, "notes", ()))
            return str(module.scheme), act_scheme, f"{module.nbytes:,}", module.path(), notes
        return None

    return layer_table(model, row)


def layer_table(model: nn.Module, row_of: Callable[[nn.Module], tuple[Any, ...] | None]) -> str:
    """Renders a table with one row per module; row_of: the cells behind its name, None for modules without a row."""
    rows = [(name, *row) for name, module in model.named_modules() if (row := row_of(module)) is not None]
    return render_layers(("layer", "weight", "activation", "bytes", "runs as", "why no more"), rows)
