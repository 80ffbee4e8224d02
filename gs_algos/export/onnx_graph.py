"""A converted network as ONNX: 8-bit codes between QuantizeLinear and DequantizeLinear, packed linears as MatMulNBits.

Layers are replaced in a copy of the model by ones that say in ONNX operators what they compute; torch.onnx does the
rest. What ONNX has no packed form for keeps its exact values, as float constants: packed convolutions, tables of
levels, 1 bit, several scales in a row beside quantized activations. ONNX Runtime's optimizer may round such a constant
to 8 bits itself if it stands between quantized activations; `ORT_DISABLE_ALL` keeps it.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.core.algorithm import evaluating
from gs_algos.core.files import whole_file
from gs_algos.core.modules import set_module
from gs_algos.core.network import network_of
from gs_algos.export.package import new_file
from gs_algos.quant.convolution import DENSE, Convolution, channels_fastest
from gs_algos.quant.packed import Packed
from gs_algos.quant.packed_embedding import PackedEmbedding
from gs_algos.quant.static_quantizer import StaticQuantizer
from gs_kernels import repack, unpack_codes
from gs_kernels.pack.formats.onnxruntime import to_matmul_nbits
from gs_kernels.pack.layouts import CANONICAL
from gs_kernels.qmatmul.ref import ACTIVATIONS

WHO = "export_onnx"
OPSET = 21
NBITS = (2, 4, 8)
log = logging.getLogger(__name__)


def export_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> Path:
    """Writes the network as the new file `path` for any batch size; input "x", output "y", both fp32.

    Args:
        example: `[B, ...]` fp32, B at least 2.

    Raises:
        ValueError: as `export_package`, or if the network has a prepared layer: convert it first.
        RuntimeError: if onnx or onnxscript is not installed.
    """
    lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise RuntimeError(f"{WHO}: needs {', '.join(lacking)}; pip install 'golden-stick-triton[onnx]'")
    target = new_file(path, ".onnx", example, WHO)
    copied = onnx_model(network_of(model, WHO))
    with evaluating(copied), torch.no_grad():
        program = torch.onnx.export(
            copied, (example,), input_names=["x"], output_names=["y"], opset_version=OPSET, dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    with whole_file(target) as draft:
        program.save(draft)
    return target


def onnx_model(model: nn.Module) -> nn.Module:
    """A copy whose packed layers and quantizers consist of ONNX operators."""
    copied = copy.deepcopy(model).cpu()
    for name, module in list(copied.named_modules()):
        if isinstance(module, Packed):
            set_module(copied, name, _OnnxLayer(module, name))
        elif isinstance(module, StaticQuantizer) and _in_place(copied, name, module):
            set_module(copied, name, _Grid(module))
    return copied


def _in_place(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is still there: those inside a replaced layer are not."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


class _Grid(nn.Module):
    """x rounded to the grid of a `StaticQuantizer`."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: StaticQuantizer) -> None:
        super().__init__()
        scheme = quantizer.scheme
        self.dtype = torch.int8 if scheme.format.signed else torch.uint8
        limits = torch.iinfo(self.dtype)
        scale, zero = quantizer.scale.float().reshape(()), quantizer.zero.reshape(())
        self.register_buffer("scale", scale.clone())
        # a zero point that no 8-bit code is has no QuantizeLinear
        self.beyond = (float(zero), scheme.qmin, scheme.qmax) if not limits.min <= zero <= limits.max else None
        self.register_buffer("zero", zero.clamp(limits.min, limits.max).to(self.dtype))
        narrow = (scheme.qmin, scheme.qmax) != (limits.min, limits.max)
        ends = [float((q - zero) * scale) for q in (scheme.qmin, scheme.qmax)]
        self.ends = (ends[0], ends[1]) if narrow else None

    def forward(self, x: Tensor) -> Tensor:
        if self.beyond is not None:
            zero, low, high = self.beyond
            return ((torch.round(x / self.scale) + zero).clamp(low, high) - zero) * self.scale
        x = x if self.ends is None else x.clamp(*self.ends)
        operands = (self.scale, self.zero)
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, *operands), dtype=self.dtype, shape=x.shape)  # type: ignore[arg-type]
        return torch.onnx.ops.symbolic("DequantizeLinear", (codes, *operands), dtype=torch.float32, shape=x.shape)  # type: ignore[arg-type]


class _OnnxLayer(nn.Module):
    """What a packed linear, convolution or embedding computes."""

    def __init__(self, layer: Packed, name: str) -> None:
        super().__init__()
        quantizers = [getattr(layer, f"{side}_quantizer", None) for side in ("input", "output")]
        self.before, self.after = (None if q is None else _Grid(q) for q in quantizers)
        self.geometry = layer.geometry if isinstance(layer, Convolution) else None
        self.activation = getattr(layer, "activation", "none")
        self.embeds = isinstance(layer, PackedEmbedding)
        self.nbits: dict[str, int] | None = None
        bias: Tensor | None = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        integers = None if self.before is None else integer_weight(layer)
        if integers is not None:
            self._keep(codes=integers[0], scale=integers[1], zeros=integers[2])
        elif self.before is None and _fits_nbits(layer):
            weight = layer.packed
            zero = weight.zero.float() if isinstance(weight.zero, Tensor) else weight.zero
            tensors, self.nbits = to_matmul_nbits(replace(weight, scale=weight.scale.float(), zero=zero), name=name)
            self._keep(codes=tensors["B"], scale=tensors["scales"], zeros=tensors.get("zero_points"))
        else:
            log.info("%s: ONNX has no packed form of it, its weight becomes floats", name)
            self._keep(weight=layer.weight.float())

    def _keep(self, **tensors: Tensor | None) -> None:
        for part in ("codes", "scale", "zeros", "weight"):
            self.register_buffer(part, tensors.get(part))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        y = ACTIVATIONS[self.activation](self._product(x))
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


def integer_weight(layer: Packed) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(codes `[O, ...]` ordered as the float layer, scale `[O]` fp32, zero `[O]`): weight = (codes - zero) * scale.

    Exactly, with positive scales: int8 codes with a zero of None, or uint8 codes and zeros. None if there are no such.
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
    shifted = codes - zero[:, None]
    fits = float(shifted.min()) >= -128 and float(shifted.max()) <= 127
    codes = shifted.to(torch.int8) if fits else codes.to(torch.uint8)
    if isinstance(layer, Convolution):
        codes = in_order(codes, layer)
    return codes.contiguous(), scale.abs(), None if fits else zero.to(torch.uint8)


def in_order(codes: Tensor, layer: Convolution) -> Tensor:
    """Rows of a convolution as filters `[O, C / groups, ...]`."""
    if not channels_fastest(layer.group_size, layer.filter):
        return codes.view(-1, *layer.filter)
    return codes.view(-1, *layer.filter[1:], layer.filter[0]).movedim(-1, 1)
