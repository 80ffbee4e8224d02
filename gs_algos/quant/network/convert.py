"""Converts trained layers to integer codes and scales, each compared with the layer it replaces."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.compare import relative_error
from gs_algos.core.modules import TRACING, get_module, set_module
from gs_algos.core.nested_tensors import tensors_of
from gs_algos.core.plan import PlanRow
from gs_algos.fx.fold_batch_norm import after_norm
from gs_algos.fx.modularize.functional_calls import release
from gs_algos.quant.fake_quant.integer_inference import rounded_bias, rounds_bias
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer
from gs_algos.quant.integer.layers import (
    QuantizedConv,
    QuantizedLayer,
    QuantizedLinear,
    empty_codes,
    packed_codes,
)
from gs_algos.quant.integer.quantized_tensor import dequantized
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.network.integer_flow import (
    activation_of,
    choose_epilogue,
    choose_int8_flow,
    disable_int8_flow,
    enable_int8_flow,
)
from gs_algos.quant.network.layer_plan import LayerPlan, layer_rows
from gs_algos.quant.packed.conv_base import Convolution, conv_rows, geometry_of, is_channels_last
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight, quantize
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.runtime.torch_private import _BatchNorm

logger = logging.getLogger(__name__)

# relative to the RMS of the trained layer's output: accumulation order only, in the dtype the layer computes in
LAYER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# whole networks: a value on the edge of two codes may fall on either side, and the next layers see a whole step;
# a deep network that itself moves further when its layers are off in the last place is held to four times that
OUTPUT_TOLERANCE = {torch.float32: 5e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Layer = TypeVar("Layer", bound=nn.Module)
MakeLayer: TypeAlias = Callable[
    [nn.Module, PlanRow[LayerPlan]], nn.Module
]  # (model, row of the plan) -> the converted layer


class _ParityError(RuntimeError):
    """Says that a converted layer or network does not give the trained output."""


@dataclass(frozen=True)
class Parity:
    """Says how far the converted network is from the trained one: RMS of the difference over RMS of the output."""

    worst_layer: str
    layer_error: float
    output_error: float


@dataclass(frozen=True)
class _Call:
    """Holds the input of a layer of the trained network, and the output of its batch norm or activation."""

    x: Tensor
    y: Tensor


def convert_model(
    model: nn.Module, rows: Sequence[PlanRow], example_inputs: Inputs, make: MakeLayer | None = None
) -> tuple[Parity, list[PlanRow]]:
    """Replaces every planned layer in the live model; the model is as it was if a comparison fails.

    Args:
        rows: of the plan that the layers were prepared by; they stay as they are.
        make: gives the converted form of one layer, its batch norm folded in; default: `quantized_layer`.

    Returns:
        How far the converted network is from the trained one, and the rows of the plan it was converted by.

    Raises:
        RuntimeError: if a layer was not called on the example inputs, is sharded, or differs once converted.
        ValueError: if the inputs do not run through the model, or a layer sees NaN or Inf.
    """
    rows = [choose_epilogue(model, row) if isinstance(row.settings, LayerPlan) else row for row in rows]
    planned = layer_rows(rows)
    with TRACING, evaluating(model):
        calls, want = _record_calls(model, planned, example_inputs)
        layers = [get_module(model, row.site) for row in planned]
        replacements = {row.site: _with_activation(row, (make or quantized_layer)(model, row)) for row in planned}
        norms = {row.site: _norm_replacement(model, row) for row in planned}
        errors = {row.site: _layer_error(row, replacements[row.site], norms[row.site], calls) for row in planned}
        swap_and_compare = partial(_swap_and_compare, model, planned, replacements, norms, example_inputs, want)
        try:
            output_error = swap_and_compare(OUTPUT_TOLERANCE)
        except _ParityError:
            own = 4 * _sensitivity(model, planned, example_inputs, want)
            output_error = swap_and_compare({dtype: max(bound, own) for dtype, bound in OUTPUT_TOLERANCE.items()})
    for layer in layers:
        release(model, layer)
    rows = [choose_int8_flow(model, row) if isinstance(row.settings, LayerPlan) else row for row in rows]
    rows = _with_int8_flow(model, rows, example_inputs)
    worst = max(errors, key=lambda site: errors[site])
    return Parity(worst, errors[worst], output_error), rows


def quantized_layer(model: nn.Module, row: PlanRow[LayerPlan]) -> QuantizedLayer:
    """Converts one trained layer, its batch norm folded in; the codes are exactly those of the trained forward."""
    layer = prepared_layer(model, row.site, FakeQuantized)
    if type(layer.weight) not in (Tensor, nn.Parameter):
        kind = type(layer.weight).__name__
        raise RuntimeError(f"convert: {row.site}.weight must be a whole tensor, got {kind}; unshard the model first")
    scheme = layer.weight_quantizer.scheme
    folded = layer.folded_weight().detach()
    scale, zero = layer.weight_quantizer.qparams(folded)
    codes = quantize(folded, scale, zero, qmin=scheme.qmin, qmax=scheme.qmax, granularity=scheme.granularity)
    bias = layer.bias
    bn = batch_norm_of(model, row)
    if bn is not None:
        slope, bias = layer.epilogue(bn)
        scale, zero = _times_slope(scale, zero, slope)
    output = output_quantizer_of(model, row)
    weight = conv_rows(packed_codes(codes, scale, zero, scheme), codes.shape[1:])
    new = _layer_of(layer, row, weight, bias, output)
    if new.input_quantizer is not None and layer.input_quantizer is not None:
        new.input_quantizer.copy_from(layer.input_quantizer)
        round_bias(new)
    if new.output_quantizer is not None:
        new.output_quantizer.copy_from(output)
    return new.eval()


def round_bias(layer: QuantizedLayer) -> None:
    """Rounds the bias of a layer with 8 bits on both sides to whole steps of its sums, as the trained eval does."""
    scale, quantizer = layer.packed.scale, layer.input_quantizer
    if layer.bias is None or quantizer is None or scale.shape[1] > 1:
        return
    if rounds_bias(layer.scheme, quantizer.scheme):
        layer.bias.copy_(rounded_bias(layer.bias, scale[:, 0], quantizer.scale))


def _layer_of(
    layer: Any, row: PlanRow[LayerPlan], weight: PackedWeight, bias: Tensor | None, output: Any
) -> QuantizedLayer:
    """Builds a converted layer around a packed weight; output: the trained output quantizer."""
    act = None if row.settings.act is None else Scheme.parse(row.settings.act, "act")
    options: dict[str, Any] = {
        "weight": weight,
        "scheme": Scheme.parse(row.settings.weight, "weight"),
        "bias": None if bias is None else bias.detach().clone(),  # it is rounded, and the trained one stays
        "input": act if getattr(layer, "input_quantizer", None) is not None else None,
        "output": None if output is None else output.scheme,
        "dtype": layer.weight.dtype,
    }
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(**options)
    conv = QuantizedConv(geometry_of(layer), layer.weight.shape[1:], **options)
    conv.channels_last = is_channels_last(layer.weight)
    return conv


def swap_converted_layers(model: nn.Module, rows: Sequence[PlanRow], make: MakeLayer | None = None) -> None:
    """Gives a freshly prepared model the structure of a converted one; the tensors are loaded afterwards.

    make: gives a converted layer whose tensors are still to be filled; default: `unfilled_layer`.
    """
    planned = layer_rows(rows)
    layers = [get_module(model, row.site) for row in planned]
    replacements = {row.site: _with_activation(row, (make or unfilled_layer)(model, row)) for row in planned}
    norms = {row.site: _norm_replacement(model, row) for row in planned}
    with _swapped_in(model, planned, replacements, norms):
        pass
    for layer in layers:
        release(model, layer)
    enable_int8_flow(model, rows)


def _with_activation(row: PlanRow[LayerPlan], layer: nn.Module) -> nn.Module:
    """Makes a converted layer compute the activation behind it in its own call."""
    activation = row.settings.epilogue.op
    if isinstance(layer, Convolution) and activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{row.site}: the activation it takes over must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        layer.activation = activation
    return layer


@torch.no_grad()
def _with_int8_flow(model: nn.Module, rows: list[PlanRow], example_inputs: Inputs) -> list[PlanRow]:
    """Lets layers emit int8 and do adds, and undoes it if the outputs of the example inputs change.

    They change where a forward writes into what a layer still has to read. Returns the rows of what holds then.
    """
    with TRACING, evaluating(model):
        want = [t.clone() for t in _tensors(run(model, example_inputs, "convert"))]
        enable_int8_flow(model, rows)
        try:
            got = [dequantized(t) for t in _tensors(run(model, example_inputs, "convert"))]
            error, reason = _output_error(got, want), "outputs would change"
        except (RuntimeError, ValueError, TypeError) as failure:
            error, reason = float("inf"), str(failure).partition("\n")[0]
    dtype = want[0].dtype if want else torch.float32
    if error <= OUTPUT_TOLERANCE.get(dtype, 0.0):
        return rows
    logger.warning("convert: layers hand on floats, and adds run apart: %s", reason)
    return disable_int8_flow(model, rows, reason)


def unfilled_layer(model: nn.Module, row: PlanRow[LayerPlan]) -> QuantizedLayer:
    """Builds the converted form of a layer of a freshly prepared model; its tensors are loaded afterwards."""
    layer: Any = prepared_layer(model, row.site, FakeQuantized)
    shape, device = layer.weight.shape, layer.weight.device
    scheme = Scheme.parse(row.settings.weight, "weight")
    weight = empty_codes(shape, scheme, device)
    offset = layer.bias is not None or row.settings.bn is not None
    bias = torch.empty(shape[0], dtype=torch.float32, device=device) if offset else None
    new = _layer_of(layer, row, weight, bias, output_quantizer_of(model, row))
    if not scheme.learned and row.settings.bn is None:  # a batch norm's gamma may turn them around
        new.signs = "positive"
    return new


def prepared_layer(model: nn.Module, site: str, kind: type[Layer]) -> Layer:
    """Returns the layer that `apply` prepared.

    Raises:
        RuntimeError: if something else stands there.
    """
    layer = get_module(model, site)
    if not isinstance(layer, kind):
        raise RuntimeError(f"convert: {site} must be the layer that apply prepared, got {type(layer).__name__}")
    return layer


def batch_norm_of(model: nn.Module, row: PlanRow[LayerPlan]) -> _BatchNorm | None:
    """Finds the batch norm that is folded into a planned layer; None if there is none."""
    bn = None if row.settings.bn is None else get_module(model, row.settings.bn)
    assert bn is None or isinstance(bn, _BatchNorm)
    return bn


def output_quantizer_of(model: nn.Module, row: PlanRow[LayerPlan]) -> Any:
    """Finds what quantizes the output of the converted layer: its own quantizer, or that of the folded batch norm."""
    own = getattr(get_module(model, row.site), "output_quantizer", None)
    if own is not None or row.settings.norm_children:
        return own
    behind = [getattr(m, "output_quantizer", None) for m in (batch_norm_of(model, row), activation_of(model, row))]
    return next((quantizer for quantizer in behind if quantizer is not None), None)


def _norm_replacement(model: nn.Module, row: PlanRow[LayerPlan]) -> nn.Module:
    """Makes what replaces the layer's batch norm: an Identity, or the norm's children that run behind it."""
    if row.settings.bn is None or not row.settings.norm_children:
        return nn.Identity()
    module = after_norm(model, row.settings.bn, row.settings.norm_children)
    quantizer = getattr(batch_norm_of(model, row), "output_quantizer", None)
    if quantizer is not None:
        module.add_module("output_quantizer", quantizer)
    return module.eval()


def _times_slope(scale: Tensor, zero: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplies scale `[C]` by slope `[O]`, C = 1, O or O * G; one scale for all becomes one per output."""
    outputs = slope.numel()
    scales, zeros = (t.view(outputs, -1) if t.numel() > 1 else t.expand(outputs, 1) for t in (scale, zero))
    return (scales * slope[:, None]).flatten(), zeros.flatten()


@contextlib.contextmanager
def _swapped_in(
    model: nn.Module,
    rows: Sequence[PlanRow[LayerPlan]],
    replacements: dict[str, nn.Module],
    norms: dict[str, nn.Module],
) -> Iterator[None]:
    """Puts the converted layers, and what stays of their batch norms, in place; an error puts the trained ones back."""
    new: dict[str, nn.Module] = dict(replacements)
    for row in rows:
        if row.settings.bn is not None:
            new[row.settings.bn] = norms[row.site]
        if row.settings.fused_activation is not None:
            new[row.settings.fused_activation] = nn.Identity()
    frozen: dict[str, nn.Module] = {}
    old = {name: get_module(model, name) for name in new}
    for name, module in new.items():
        set_module(model, name, module)
    for name, module in list(model.named_modules()):
        if isinstance(module, ActivationQuantizer):
            frozen[name] = module
            set_module(model, name, _frozen(module))
    try:
        yield
    except BaseException:
        for name, module in {**frozen, **old}.items():
            set_module(model, name, module)
        raise


def _frozen(quantizer: ActivationQuantizer) -> StaticQuantizer:
    """Freezes an activation quantizer that sits in a module of its own (the operands of an add)."""
    static = StaticQuantizer(quantizer.scheme, quantizer.scale.device)
    static.copy_from(quantizer)
    return static


def _record_calls(
    model: nn.Module, rows: Sequence[PlanRow[LayerPlan]], example_inputs: Inputs
) -> tuple[dict[str, _Call], list[Tensor]]:
    """Runs the trained model in eval; returns every planned layer's call, and the network's output tensors."""
    seen: dict[str, Tensor] = {}
    handles = []

    def remember(name: str, key: str, pick: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            seen[key] = (given if pick == 0 else output).detach().clone()  # an in-place activation may follow

        # first of all: the user's own hooks, which may change the output, will act on the converted layer's too
        handles.append(get_module(model, name).register_forward_hook(hook, with_kwargs=True, prepend=True))

    for row in rows:
        behind = row.settings.fused_activation or row.settings.bn or row.site
        remember(row.site, f"{row.site} x", 0)
        remember(behind, f"{row.site} y", 1)
    try:
        want = _tensors(run(model, example_inputs, "convert"))
    finally:
        for handle in handles:
            handle.remove()
    missed = [row.site for row in rows if f"{row.site} y" not in seen]
    if missed:
        raise RuntimeError(
            f"convert: every planned layer must run on the example inputs, got none for {', '.join(missed)}"
        )
    calls = {row.site: _Call(seen[f"{row.site} x"], seen[f"{row.site} y"]) for row in rows}
    for site, call in calls.items():
        if call.x.numel() == 0:
            shape = tuple(call.x.shape)
            raise ValueError(
                f"convert: what {site} sees of the example inputs must hold at least one element, got shape {shape}"
            )
        if not bool(call.x.isfinite().all()):
            raise ValueError(f"convert: what {site} sees of the example inputs must be finite, got NaN or Inf")
    return calls, want


def _swap_and_compare(
    model: nn.Module,
    rows: Sequence[PlanRow[LayerPlan]],
    replacements: dict[str, nn.Module],
    norms: dict[str, nn.Module],
    example_inputs: Inputs,
    want: list[Tensor],
    tolerance: dict[torch.dtype, float],
) -> float:
    """Swaps the converted layers in and returns the error of the outputs; too large an error undoes the swap."""
    with _swapped_in(model, rows, replacements, norms):
        error = _output_error(_tensors(run(model, example_inputs, "convert")), want)
        _check_parity("the network", error, tolerance, want[0].dtype if want else torch.float32)
    return error


def _sensitivity(
    model: nn.Module, rows: Sequence[PlanRow[LayerPlan]], example_inputs: Inputs, want: list[Tensor]
) -> float:
    """Measures how far the trained outputs move when every planned layer's output is off in the last place."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu").to(output)
        return output + output * noise * (4 * torch.finfo(output.dtype).eps)

    modules = [get_module(model, row.settings.bn or row.site) for row in rows]
    handles = [module.register_forward_hook(disturb) for module in modules]
    try:
        return _output_error(_tensors(run(model, example_inputs, "convert")), want)
    finally:
        for handle in handles:
            handle.remove()


def _output_error(got: list[Tensor], want: list[Tensor]) -> float:
    return max((relative_error(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def _layer_error(row: PlanRow, new: nn.Module, behind: nn.Module, calls: dict[str, _Call]) -> float:
    call = calls[row.site]
    error = relative_error(behind(new(call.x)), call.y)
    # behind an output quantizer an edge value may fall on either side, as at the end of a network
    quantizers = [m for m in behind.modules() if isinstance(m, ActivationQuantizer | StaticQuantizer)]
    exact = getattr(new, "output_quantizer", None) is None and not quantizers
    tolerance = LAYER_TOLERANCE if exact else OUTPUT_TOLERANCE
    _check_parity(row.site, error, tolerance, call.y.dtype)
    return error


def _check_parity(what: str, error: float, tolerance: dict[torch.dtype, float], dtype: torch.dtype) -> None:
    bound = tolerance.get(dtype, 0.0)
    if not error <= bound:
        raise _ParityError(
            f"convert: {what} must give the trained output within {bound:g} relative RMS, got {error:.3g}"
        )


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tensors_of(output) if t.is_floating_point()]
