"""A tensor that is held as 8-bit codes: what an integer layer hands to the next one when nothing needs the floats.

Operations that commute with rounding run on the codes, exactly as on floats that are quantized afterwards: rounding
keeps the order of values, and 0 and 6 are rounded as the values are. Every other operation sees the real values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten

# change no value, or keep some of them
_MOVES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.expand.default,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
}


class CodesTensor(Tensor):
    """Reads as a float tensor; holds int8 `codes` of the grid of `quantizer`, those of an unsigned grid 128 lower.

    Args:
        codes: int8, any shape and strides.
        quantizer: the `StaticQuantizer` whose codes they are.
        dtype: of the real values.
    """

    codes: Tensor
    quantizer: Any

    @staticmethod
    def __new__(cls, codes: Tensor, quantizer: Any, dtype: torch.dtype) -> CodesTensor:
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device, storage_offset=0
        )

    def __init__(self, codes: Tensor, quantizer: Any, dtype: torch.dtype) -> None:
        self.codes, self.quantizer = codes, quantizer

    def dequantize(self) -> Tensor:
        """The values, `(code - zero) * scale`."""
        values = (self.codes.float() - self.quantizer.signed_zero()) * self.quantizer.scale
        return values.to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CodesTensor({list(self.shape)}, {self.quantizer.scheme})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], CodesTensor) else None
        if x is not None:
            if func in _MOVES:
                return CodesTensor(func(x.codes, *args[1:], **kwargs), x.quantizer, x.dtype)
            if func in _ON_CODES:
                return CodesTensor(_ON_CODES[func](x, *args[1:]), x.quantizer, x.dtype)
            if func in _IN_PLACE:
                x.codes.copy_(_ON_CODES[_IN_PLACE[func]](x, *args[1:]))
                return x
            if func is aten.max_pool2d_with_indices.default:
                # a float pool of small integers is exact; ATen pools no int8
                y, indices = func(x.codes.float(), *args[1:], **kwargs)
                return CodesTensor(y.to(torch.int8), x.quantizer, x.dtype), indices
            if func._schema.is_mutable:  # PyTorch would return x as it was
                raise RuntimeError(
                    f"CodesTensor: {func} must not write into 8-bit codes, got it outside the traced forward (a hook?);"
                    " use the operation that returns a new tensor"
                )
        return func(*tree_map(_real, args), **tree_map(_real, kwargs))


def _real(value: Any) -> Any:
    return value.dequantize() if isinstance(value, CodesTensor) else value


def _relu(x: CodesTensor) -> Tensor:
    return torch.maximum(x.codes, x.quantizer.signed_zero().to(torch.int8))


def _hardtanh(x: CodesTensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    ends = x.quantizer.signed_codes(torch.tensor([low, high], dtype=torch.float32, device=x.codes.device))[0]
    return torch.clamp(x.codes, ends[:1], ends[1:])


_ON_CODES: dict[Any, Callable[..., Tensor]] = {aten.relu.default: _relu, aten.hardtanh.default: _hardtanh}
_IN_PLACE = {aten.relu_.default: aten.relu.default, aten.hardtanh_.default: aten.hardtanh.default}
