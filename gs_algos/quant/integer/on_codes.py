"""Computes operations on the int8 codes of a `QuantizedTensor`, where that comes to the same as on its values.

Operations that commute with rounding run on the codes, exactly as on floats that are quantized afterwards: rounding
keeps the order of values, and 0 and 6 are rounded as the values are. Averages read the codes and give floats.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gs_algos.quant.memory_format import strides_in, suggested

if TYPE_CHECKING:
    from gs_algos.quant.integer.quantized_tensor import QuantizedTensor

aten = torch.ops.aten

# change no value, or keep some of them
_MOVES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.index_select.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
}


def parts(func: Any, x: QuantizedTensor, *args: Any) -> list[Tensor]:
    """Computes what `SPLITS` give, each part a slice of its own."""
    axis = args[1] if len(args) > 1 else 0
    ends = [0]
    for part in func(torch.empty(x.shape, device="meta"), *args):  # which refuses sizes that do not fit
        ends.append(ends[-1] + part.shape[axis])
    return [aten.slice.Tensor(x, axis, start, end) for start, end in pairwise(ends)]


def _alias(func: Any, x: QuantizedTensor) -> QuantizedTensor:
    return x.of(func(x.codes), x.quantizer, x.like)


def _move(func: Any, x: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    return type(x)(func(x.lay(), *args, **kwargs), x.quantizer, x.dtype)


def _max_pool(func: Any, x: QuantizedTensor, *args: Any, **kwargs: Any) -> tuple[QuantizedTensor, Tensor]:
    # a float pool of small integers is exact; ATen pools no int8
    y, indices = func(x.codes.float(), *args, **kwargs)
    strides = strides_in(y.shape, suggested(x.shape, x.stride()))
    return type(x)(y.to(torch.int8), x.quantizer, x.dtype, strides), indices


def _average(func: Any, x: QuantizedTensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs:
        return func(x.dequantize(), *args, **kwargs)  # type: ignore[no-any-return]
    grid, mean = x.quantizer.constants(), _mean if func is aten.mean.dim else func
    return (mean(x.lay().float() - grid.zero, *args) * grid.scale).to(x.dtype)  # type: ignore[no-any-return]


def _mean(x: Tensor, axes: list[int] | None, keepdim: bool = False) -> Tensor:
    """Divides the sums, which are whole and exact: a GPU's own mean multiplies by the inverse of their number."""
    sums = x.sum(axes, keepdim)
    return sums / torch.full_like(sums, x.numel() // max(1, sums.numel()))


def _activated(func: Any, x: QuantizedTensor, *args: float) -> QuantizedTensor:
    return x.of(_ACTIVATIONS[func](x, *args), x.quantizer, x.like)


def _activated_in_place(func: Any, x: QuantizedTensor, *args: float) -> QuantizedTensor:
    x.codes.copy_(_ACTIVATIONS[func](x, *args))
    return x


def _relu(x: QuantizedTensor) -> Tensor:
    low, high = x.quantizer.signed_limits()
    return torch.maximum(x.codes, x.quantizer.signed_zero().clamp(low, high).to(torch.int8))


def _hardtanh(x: QuantizedTensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    limits = torch.full((2,), low, dtype=torch.float32, device=x.codes.device)  # no copy from a CPU, which would wait
    limits[1:].fill_(high)
    ends = x.quantizer.signed_codes(limits)[0]
    return torch.clamp(x.codes, ends[:1], ends[1:])


_ACTIVATIONS: dict[Any, Callable[..., Tensor]] = {
    aten.relu.default: _relu,
    aten.relu_.default: _relu,
    aten.hardtanh.default: _hardtanh,
    aten.hardtanh_.default: _hardtanh,
}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
# what becomes of codes without a way through floats: (operator, tensor, its further arguments) -> result
ON_CODES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default), _alias),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys((aten.relu.default, aten.hardtanh.default), _activated),
    **dict.fromkeys((aten.relu_.default, aten.hardtanh_.default), _activated_in_place),
    aten.max_pool2d_with_indices.default: _max_pool,
    **dict.fromkeys((aten.mean.dim, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default), _average),
}
