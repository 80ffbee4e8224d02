"""Other providers of products with packed weights, for the benchmark: each takes the arguments of `qmatmul`.

What a library makes of a weight at load time is made once and not timed. The benchmark compares results before it
times, so a provider that reads a weight in another way than it was written is left out, not believed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, unpack_codes

Prepare = Callable[[PackedWeight, torch.dtype], Any]


def _once_per_weight(prepare: Prepare) -> Prepare:
    known: Any = WeakIdKeyDictionary()

    def prepared(weight: PackedWeight, dtype: torch.dtype) -> Any:
        if weight.codes not in known:
            known[weight.codes] = prepare(weight, dtype)
        return known[weight.codes]

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


_float_weight = _once_per_weight(dequantize_packed)


def _finish(y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = y if bias is None else y + bias
    return y if activation == "none" else getattr(torch.nn.functional, activation)(y)


def float_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """The float layer that a packed one replaces, its weight dequantised beforehand."""
    return _finish(torch.nn.functional.linear(x, _float_weight(weight, x.dtype)), bias, activation)


def tinygemm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """torch's own 4-bit product, `aten::_weight_int4pack_mm`."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or weight.bits != 4:
        raise ValueError("tinygemm: needs bf16 x on a GPU and 4-bit weights")
    packed, grid = _tinygemm_parts(weight, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm(rows, packed, weight.group_size, grid)
    return _finish(y.view(*x.shape[:-1], -1), bias, activation)


def gemlite(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    if not x.is_cuda or x.dtype == torch.float32:
        raise ValueError("gemlite: needs 16-bit x on a GPU")
    return _finish(_gemlite_layer(weight, x.dtype)(x), bias, activation)


def peers() -> dict[str, Callable[..., Tensor]]:
    """Those that can run here."""
    found: dict[str, Callable[..., Tensor]] = {"float_linear": float_linear}
    if torch.cuda.is_available():
        found["tinygemm"] = tinygemm
        if importlib.util.find_spec("gemlite") is not None:
            found["gemlite"] = gemlite
    return found
