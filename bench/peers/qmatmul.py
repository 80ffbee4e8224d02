"""Calls other providers of packed products, for the benchmark: each takes the arguments of `qmatmul`.

What a library makes of a weight at load time is made once and not timed. The benchmark compares results before it
times, so a provider that reads a weight in another way than it was written is left out, not believed.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gs_kernels.pack.layouts import CANONICAL, PackedWeight
from gs_kernels.pack.pack import dequantize_packed, repack, unpack_codes
from gs_kernels.qmatmul.op_int8 import quantize_rows

Prepare = Callable[[PackedWeight, torch.dtype], Any]


def _once_per_weight(prepare: Prepare) -> Prepare:
    cache: Any = WeakIdKeyDictionary()

    def prepared(weight: PackedWeight, dtype: torch.dtype) -> Any:
        if weight.codes not in cache:
            cache[weight.codes] = prepare(weight, dtype)
        return cache[weight.codes]

    return prepared


def _codes(weight: PackedWeight) -> Tensor:
    return unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)


def _zeros(weight: PackedWeight) -> Tensor:
    return weight.zero if isinstance(weight.zero, Tensor) else torch.full_like(weight.scale, weight.zero)


@_once_per_weight
def _tinygemm_parts(weight: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = _codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scale = weight.scale.float()
    zero = (8 - _zeros(weight).float()) * scale  # its real value is (code - 8) * scale + zero
    return packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous().to(dtype)


@cache
def _gemlite_table() -> dict[str, Any]:
    """Has GemLite read its table for this GPU, and returns it: an H200 is an H100 to it, for which it finds none."""
    from gemlite.core import GemLiteLinear  # type: ignore[import-not-found]

    folder = Path(importlib.import_module("gemlite").__file__ or "").parent / "configs"
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    fitting = sorted((path for path in folder.glob("*.json") if path.stem in name), key=lambda path: len(path.stem))
    if not fitting and torch.cuda.get_device_capability() == (9, 0):
        fitting = [folder / "h100.json"]
    if not fitting or not GemLiteLinear.load_config(str(fitting[-1])):
        return {}
    return dict(json.loads(fitting[-1].read_text()))


def gemlite_knows(table: dict[str, Any], m: int, weight: PackedWeight) -> bool:
    """Returns whether GemLite's table has a product: keys are `(rows, size, size, group, codes in 32 bits, kind)`."""
    n, k = weight.shape
    per_word = 32 // weight.bits
    starts = [f"({m}, {a}, {b}, {weight.group_size}, {per_word}, " for a, b in ((n, k), (k, n))]
    return any(key.startswith(start) for entries in table.values() for key in entries for start in starts)


@_once_per_weight
def _gemlite_layer(weight: PackedWeight, dtype: torch.dtype) -> Any:
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    n, k = weight.shape
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(
        weight.bits,
        group_size=weight.group_size,
        in_features=k,
        out_features=n,
        input_dtype=kind,
        output_dtype=kind,
    )
    layer.pack(_codes(weight), weight.scale.to(dtype).view(-1, 1), _zeros(weight).to(dtype).view(-1, 1), None)
    return layer


@_once_per_weight
def _hqq_layer(weight: PackedWeight, dtype: torch.dtype) -> Any:
    """Makes a layer of theirs around our codes: `(code - zero) * scale`, a scale per row of `[N * G, group_size]`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer  # type: ignore[import-not-found]

    bits, group = weight.bits, weight.group_size
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    layer = HQQLinear(None, config, compute_dtype=dtype, device=str(weight.device), initialize=False)
    packing = Quantizer.bit_to_packing[bits]
    layer.W_q = Quantizer.pack[packing](_codes(weight).view(-1, group))
    layer.meta = {
        **{"nbits": bits, "group_size": group, "shape": torch.Size(weight.shape), "axis": 1, "packing": packing},
        **{"unpack_view_dtype": Quantizer.unpack_view_dtype[packing], "view_as_float": False, "compute_dtype": dtype},
        **{"quant_scale": False, "quant_zero": False},
        "scale": weight.scale.to(dtype).view(-1, 1),
        "zero": _zeros(weight).to(dtype).view(-1, 1),
    }
    layer.ready = True
    return layer


@_once_per_weight
def _torchao_weight(weight: PackedWeight, dtype: torch.dtype) -> Any:
    """Makes the weight that their `IntxWeightOnlyConfig` makes: one code a byte, signed."""
    from torchao.quantization import IntxUnpackedToInt8Tensor  # type: ignore[import-not-found]

    middle = 2 ** (weight.bits - 1)
    codes = (_codes(weight).to(torch.int16) - middle).to(torch.int8)
    zero = (_zeros(weight).float() - middle).to(dtype)
    block = (1, weight.group_size)
    return IntxUnpackedToInt8Tensor(
        codes, weight.scale.to(dtype), zero, getattr(torch, f"int{weight.bits}"), block, dtype, None
    )


@_once_per_weight
def _bitsandbytes_parts(weight: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes (4 bits: the first of a pair in the high half), each block's largest value, and the table."""
    codes, middle = _codes(weight), 2 ** (weight.bits - 1)
    if not torch.equal(_zeros(weight), torch.full_like(weight.scale, middle)):
        raise ValueError("bitsandbytes: needs a symmetric grid")
    if weight.bits == 4:
        codes = ((codes[:, ::2] << 4) | codes[:, 1::2]).reshape(-1, 1)
    table = (torch.arange(2**weight.bits, device=weight.device) - middle) / middle
    return codes.contiguous(), weight.scale.float().flatten() * middle, table.float()


@_once_per_weight
def _conch_parts(weight: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns int32 words `[K * bits / 32, N]`, low bits first, and scales `[G, N]`."""
    middle = 2.0 ** (weight.bits - 1)
    if not torch.equal(_zeros(weight).float(), torch.full_like(weight.scale, middle).float()):
        raise ValueError("conch: needs a symmetric grid")
    words = repack(weight, CANONICAL).codes.view(torch.int32)
    return words.t().contiguous(), weight.scale.to(dtype).t().contiguous()


@_once_per_weight
def _scaled_mm_parts(weight: PackedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns codes less their zero point as 8-bit floats `[N, K]`, and scales `[1, N]`."""
    return (_codes(weight).float() - _zeros(weight).float()).to(torch.float8_e4m3fn), weight.scale.float().view(1, -1)


_float_weight = _once_per_weight(dequantize_packed)


def _finish(y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = y if bias is None else y + bias
    return y if activation == "none" else getattr(torch.nn.functional, activation)(y)


def float_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Calls the float layer that a packed one replaces, its weight dequantized beforehand."""
    return _finish(torch.nn.functional.linear(x, _float_weight(weight, x.dtype)), bias, activation)


def tinygemm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Calls torch's own 4-bit product, `aten::_weight_int4pack_mm`."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.bits != 4:
        raise ValueError("tinygemm: needs bf16 x on a GPU and 4-bit weights")
    packed, grid = _tinygemm_parts(weight, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm(rows, packed, weight.group_size, grid)
    return _finish(y.view(*x.shape[:-1], -1), bias, activation)


def gemlite(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    if not x.is_cuda or x.dtype == torch.float32:
        raise ValueError("gemlite: needs 16-bit x on a GPU")
    rows = math.prod(x.shape[:-1])
    if not gemlite_knows(_gemlite_table(), rows, weight):
        raise ValueError(f"gemlite: has no tuned entry for {rows} rows of {weight.shape}; it would search for minutes")
    return _finish(_gemlite_layer(weight, x.dtype)(x), bias, activation)


def scaled_mm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Calls torch's own product of 8-bit floats, `aten::_scaled_mm`, of rows that are quantized as ours are.

    With one scale a row codes are exact in float8_e4m3, and the product is that of `qmatmul_fp8`.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.scale.shape[-1] != 1:
        raise ValueError("scaled_mm: needs bf16 x on a GPU and one scale a row")
    codes, scale = quantize_rows(x.reshape(-1, x.shape[-1]), dtype=torch.float8_e4m3fn)
    w, w_scale = _scaled_mm_parts(weight, x.dtype)
    y = torch._scaled_mm(codes, w.t(), scale_a=scale.view(-1, 1), scale_b=w_scale, out_dtype=x.dtype)
    return _finish(y.view(*x.shape[:-1], -1), bias, activation)


def hqq(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Calls the backend that they have everywhere, compiled as they advise on a GPU."""
    layer = _hqq_layer(weight, x.dtype)
    run = layer.forward_pytorch_compile if x.is_cuda else layer.forward_pytorch
    return _finish(run(x), bias, activation)


def torchao(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    return _finish(torch.nn.functional.linear(x, _torchao_weight(weight, x.dtype)), bias, activation)


def bitsandbytes(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Calls their vector product of 4 bits, or their 8-bit codes with a table: both take any symmetric grid."""
    import bitsandbytes.functional as theirs  # type: ignore[import-not-found]

    rows = x.reshape(-1, x.shape[-1])
    if weight.bits != 8 and not (weight.bits == 4 and rows.shape[0] == 1 and x.is_cuda):
        raise ValueError(
            "bitsandbytes: needs 8-bit weights, or 4-bit ones, one row and a GPU; it knows NF4 and FP4 else"
        )
    codes, most, table = _bitsandbytes_parts(weight, x.dtype)
    if weight.bits == 4:
        y = torch.ops.bitsandbytes.gemv_4bit(rows, codes, weight.shape, most, table, weight.group_size)
    else:
        w = theirs.dequantize_blockwise(codes, absmax=most, code=table, blocksize=weight.group_size)
        y = torch.nn.functional.linear(rows, w.to(x.dtype))
    return _finish(y.view(*x.shape[:-1], -1), bias, activation)


def conch(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    if not x.is_cuda or x.dtype == torch.float32:
        raise ValueError("conch: needs 16-bit x on a GPU")
    from conch.ops.quantization.gemm import mixed_precision_gemm  # type: ignore[import-not-found]

    words, scale = _conch_parts(weight, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = mixed_precision_gemm(rows, words, scale, None, weight.bits, 2 ** (weight.bits - 1), weight.group_size)
    return _finish(y.view(*x.shape[:-1], -1), bias, activation)


LIBRARIES: dict[str, Callable[..., Tensor]] = {
    "gemlite": gemlite,
    "hqq": hqq,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "conch": conch,
}
ON_A_GPU = ("gemlite", "conch")


def providers() -> dict[str, Callable[..., Tensor]]:
    """Returns those that can run here."""
    runnable: dict[str, Callable[..., Tensor]] = {"float_linear": float_linear}
    if torch.cuda.is_available():
        runnable["tinygemm"] = tinygemm
    return runnable | {name: run for name, run in LIBRARIES.items() if name not in absent()}


def absent() -> dict[str, str]:
    """Returns those that cannot run here, each with the reason."""
    reasons = {}
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            reasons[name] = "is not installed"
        elif name in ON_A_GPU and not torch.cuda.is_available():
            reasons[name] = "needs a GPU"
    return reasons
