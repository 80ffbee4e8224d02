"""Exports a converted network to ONNX: 8-bit codes between Quantize- and DequantizeLinear, and MatMulNBits.

ONNX Runtime multiplies uint8 activations by int8 weights with an instruction that adds two products in 16 bits, on x86
CPUs without VNNI: 255 * (w1 + w2) saturates there once weights exceed 64. So activations are uint8, and so are weights
beyond 64, whose products it adds in 32 bits on every CPU; smaller codes stay int8, which is faster.

Layers are replaced in a copy of the model by ones that say in ONNX operators what they compute; torch.onnx does the
rest. What ONNX has no packed form for keeps its exact values, as float constants: packed convolutions, tables of
levels, 1 bit, several scales in a row beside quantized activations. ONNX Runtime's optimizer may round such a constant
to 8 bits itself if it stands between quantized activations; `ORT_DISABLE_ALL` keeps it.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.adder.layers import AdderConv2dInt8, AdderLayer
from gs_algos.core.algorithm import Inputs, evaluating
from gs_algos.core.files import whole_file
from gs_algos.core.modules import set_module
from gs_algos.export.example import exportable, new_file, read_by_torch
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.packed.conv_base import DENSE, Convolution, channels_fastest
from gs_algos.quant.packed.embedding import PackedEmbedding
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedConv1D
from gs_algos.quant.packed.module import Packed
from gs_algos.quant.rotation import rotations_of
from gs_kernels import UnsupportedError, repack, unpack_codes
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.formats.onnxruntime import to_matmul_nbits
from gs_kernels.pack.layouts import CANONICAL
from gs_kernels.runtime.torch_private import tree_map_only

WHO = "export_onnx"
OPSET = 21
NBITS = (2, 4, 8)
NEVER_SATURATES = 64  # 2 * 64 * 255 is an int16
log = logging.getLogger(__name__)


def export_onnx(
    model: nn.Module, example: Inputs, path: str | os.PathLike[str], *, signed_weights: bool = False
) -> Path:
    """Writes the network as the new file `path` for any batch size, with fp32 inputs and outputs (or of integers).

    One input is called "x" and one output "y". Several inputs have the names of the network's parameters or those in
    the dict; several outputs are "y0", "y1", ..., or have the keys of a dict.

    Args:
        example: `[B, ...]`, B at least 2; or a tuple of such, or a dict by name. Inputs whose first size is not B, that
            of the first, keep their sizes.
        signed_weights: keep 8-bit weights int8. ONNX Runtime then multiplies some 2.5 times faster on CPUs with VNNI,
            but on x86 CPUs without it the outputs are wrong, by a tenth and more.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it is prepared for training and not converted, the file is there already or does not end in
            .onnx, or the example is none of the above or does not run through the network.
        UnsupportedError: if torch cannot read the network, it rotates what a layer reads as it runs, or it has adder
            layers.
        RuntimeError: if onnx or onnxscript is not installed.
    """
    lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise RuntimeError(f"{WHO}: needs {', '.join(lacking)}; pip install 'golden-stick-triton[onnx]'")
    target = new_file(path, ".onnx", WHO)
    network, call = exportable(model, example, WHO)
    if rotations := rotations_of(network):
        raise UnsupportedError(
            f"{WHO}: ONNX has no rotation, got {next(iter(rotations))} and {len(rotations) - 1} more modules that are "
            "rotated as they run; quantize without rotate"
        )
    if adders := [name for name, m in network.named_modules() if isinstance(m, AdderLayer | AdderConv2dInt8)]:
        raise UnsupportedError(
            f"{WHO}: ONNX has no operator for sums of absolute differences, got {', '.join(adders[:4])}"
            f"{' and more' if len(adders) > 4 else ''}; use export_package, which keeps ours"
        )
    for name, t in zip(call.names, call.tensors, strict=True):
        if t.is_floating_point() and t.dtype != torch.float32:
            raise ValueError(f"{WHO}: example must be of float32 or integers, got {name} in {t.dtype}; use .float()")
    copied = onnx_model(network, signed_weights)
    args, kwargs = tree_map_only(Tensor, lambda t: t.cpu(), (call.args, call.kwargs))
    with evaluating(copied), torch.no_grad(), read_by_torch(WHO):
        traced = torch.export.export(copied, args, kwargs, dynamic_shapes=call.dynamic_shapes)
        program = torch.onnx.export(
            traced, input_names=call.names, output_names=call.outputs, opset_version=OPSET, dynamo=True, verbose=False,
            dynamic_shapes=call.dynamic_shapes,
        )  # fmt: skip
    assert program is not None
    with whole_file(target) as draft:
        program.save(draft)
    return target


def onnx_model(model: nn.Module, signed_weights: bool = False) -> nn.Module:
    """Makes a copy whose packed layers and quantizers consist of ONNX operators."""
    copied = copy.deepcopy(model).cpu()
    if isinstance(copied, Packed):
        return _OnnxLayer(copied, "the network", signed_weights)
    for name, module in list(copied.named_modules()):
        if isinstance(module, Packed):
            set_module(copied, name, _OnnxLayer(module, name, signed_weights))
        elif isinstance(module, StaticQuantizer) and _in_place(copied, name, module):
            set_module(copied, name, _Grid(module))
    return copied


def _in_place(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Says whether a module is still there: those inside a replaced layer are not."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


class _Grid(nn.Module):
    """Rounds x to the grid of a `StaticQuantizer`."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: StaticQuantizer) -> None:
        super().__init__()
        scheme = quantizer.scheme
        up = 128 if scheme.format.signed else 0  # signed codes are written 128 higher, as uint8
        low, high = scheme.qmin + up, scheme.qmax + up
        scale, zero = quantizer.scale.float().reshape(()), quantizer.zero.reshape(()) + up
        self.register_buffer("scale", scale.clone())
        # a zero point that no 8-bit code is has no QuantizeLinear
        self.beyond = (float(zero), low, high) if not 0 <= zero <= 255 else None
        self.register_buffer("zero", zero.clamp(0, 255).to(torch.uint8))
        ends = [float((q - zero) * scale) for q in (low, high)]
        self.ends = (ends[0], ends[1]) if (low, high) != (0, 255) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.beyond is not None:
            zero, low, high = self.beyond
            return ((torch.round(x / self.scale) + zero).clamp(low, high) - zero) * self.scale
        x = x if self.ends is None else x.clamp(*self.ends)
        operands = (self.scale, self.zero)
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, *operands), dtype=torch.uint8, shape=x.shape)  # type: ignore[arg-type]
        return torch.onnx.ops.symbolic("DequantizeLinear", (codes, *operands), dtype=torch.float32, shape=x.shape)  # type: ignore[arg-type]


class _Rows(nn.Module):
    """Rounds each row of x to 8 bits with a scale of its own, as `DynamicPackedLinear` does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        return torch.round(x / scale) * scale


class _OnnxLayer(nn.Module):
    """Computes what a packed linear, convolution or embedding does."""

    def __init__(self, layer: Packed, name: str, signed: bool = False) -> None:
        super().__init__()
        quantizers = [getattr(layer, f"{side}_quantizer", None) for side in ("input", "output")]
        self.before, self.after = (None if q is None else _Grid(q) for q in quantizers)
        self.rows = _Rows() if isinstance(layer, DynamicPackedLinear) else None
        self.geometry = layer.geometry if isinstance(layer, Convolution) else None
        self.activation = getattr(layer, "activation", "none")
        self.embeds = isinstance(layer, PackedEmbedding)
        self.nbits: dict[str, int] | None = None
        bias: Tensor | None = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        integers = None if self.before is None else integer_weight(layer, signed)
        if integers is not None:
            self._keep(codes=integers[0], scale=integers[1], zeros=integers[2])
        elif self.before is None and _fits_nbits(layer):
            weight = layer.packed
            zero = weight.zero.float() if isinstance(weight.zero, Tensor) else weight.zero
            tensors, self.nbits = to_matmul_nbits(replace(weight, scale=weight.scale.float(), zero=zero), name=name)
            self._keep(codes=tensors["B"], scale=tensors["scales"], zeros=tensors.get("zero_points"))
        else:
            log.info("%s: ONNX has no packed form of it, its weight becomes floats", name)
            dense = layer.weight.float()
            self._keep(weight=dense.t() if isinstance(layer, PackedConv1D) else dense)

    def _keep(self, **tensors: Tensor | None) -> None:
        for part in ("codes", "scale", "zeros", "weight"):
            self.register_buffer(part, tensors.get(part))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        x = x if self.rows is None else self.rows(x)
        y = ACTIVATIONS[self.activation].function(self._product(x))
        return y if self.after is None else self.after(y)

    def _product(self, x: Tensor) -> Tensor:
        if self.nbits is not None:
            return self._matmul_nbits(x)
        weight: Any = self.weight
        if weight is None:
            codes: Any = self.codes
            operands: Any = (codes, self.scale) if self.zeros is None else (codes, self.scale, self.zeros)
            weight = torch.onnx.ops.symbolic(
                "DequantizeLinear", operands, {"axis": 0}, dtype=torch.float32, shape=codes.shape
            )
        bias: Any = self.bias
        if self.embeds:
            return F.embedding(x, weight)
        if self.geometry is None:
            return F.linear(x, weight, bias)
        g, padding = self.geometry, self.geometry["padding"]
        if g["padding_mode"] != "zeros":
            x, padding = F.pad(x, g["pad"], mode=g["padding_mode"]), 0
        return DENSE[weight.dim() - 1](x, weight, bias, g["stride"], padding, g["dilation"], g["groups"])

    def _matmul_nbits(self, x: Tensor) -> Tensor:
        assert self.nbits is not None
        inputs: list[Any] = [x, self.codes, self.scale, self.zeros]
        if self.bias is not None:
            inputs += [None, self.bias]  # the one left out is g_idx
        shape = (*x.shape[:-1], self.nbits["N"])
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, dict(self.nbits), dtype=torch.float32, shape=shape, version=1
        )


def _fits_nbits(layer: Packed) -> bool:
    weight = layer.packed
    linear = not isinstance(layer, Convolution | PackedEmbedding)
    groups = weight.group_size == weight.shape[1] or weight.group_size % 16 == 0
    whole = isinstance(weight.zero, float) and weight.zero == round(weight.zero)
    return linear and weight.bits in NBITS and weight.levels is None and groups and (weight.bits < 8 or whole)


def integer_weight(layer: Packed, signed: bool = False) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Returns codes `[O, ...]` as the float layer has them, scale and zero `[O]` fp32: weight = (codes - zero) * scale.

    Exactly, with positive scales: int8 codes in -64..64 with a zero of None, else uint8 codes and zeros. Few bits are
    spread over that range, for the runtime rounds a bias to a multiple of the scale. None if there are no such codes.

    Args:
        signed: int8 codes may be of -128..127.
    """
    weight = repack(layer.packed, CANONICAL)
    if weight.group_size != weight.shape[1] or weight.levels is not None:
        return None
    scale = weight.scale.float().flatten()
    zero = torch.as_tensor(weight.zero, dtype=torch.float32).expand(scale.shape[0], 1).flatten()
    codes = unpack_codes(weight.codes, weight.bits, weight.shape).float()
    if bool((zero != zero.round()).any()):  # half steps, as SLB has them, are whole on a grid twice as fine
        codes, zero, scale = codes * 2, zero * 2, scale / 2
    top = float(codes.max())
    negative = scale < 0
    codes = torch.where(negative[:, None], top - codes, codes)
    zero = torch.where(negative, top - zero, zero)
    if bool((zero != zero.round()).any()) or min(float(zero.min()), 255 - max(top, float(zero.max()))) < 0:
        return None
    scale, shifted = scale.abs(), codes - zero[:, None]
    low, high = float(shifted.min()), float(shifted.max())
    kept: Tensor | None = None
    if max(-low, high) <= NEVER_SATURATES:
        finer = 2 ** int(math.log2(NEVER_SATURATES / max(-low, high, 1)))
        codes, scale = (shifted * finer).to(torch.int8), scale / finer
    elif low < -128 or high > 127:
        codes, kept = codes.to(torch.uint8), zero.to(torch.uint8)
    elif signed:
        codes = shifted.to(torch.int8)
    else:
        codes, kept = (shifted + 128).to(torch.uint8), torch.full_like(zero, 128, dtype=torch.uint8)
    if isinstance(layer, Convolution):
        codes = in_order(codes, layer)
    return codes.contiguous(), scale, kept


def in_order(codes: Tensor, layer: Convolution) -> Tensor:
    """Reshapes rows of a convolution to filters `[O, C / groups, ...]`."""
    if not channels_fastest(layer.group_size, layer.filter):
        return codes.view(-1, *layer.filter)
    return codes.view(-1, *layer.filter[1:], layer.filter[0]).movedim(-1, 1)
