"""Defines a convolution whose weight is packed codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gs_algos.quant.integer.prepared_call import PreparedConv, cached, kind_of
from gs_algos.quant.integer.quantized_tensor import values
from gs_algos.quant.packed.conv_base import Convolution
from gs_algos.quant.packed.module import Packed, PackedFormat, autocast_dtype
from gs_kernels import PackedWeight


class PackedConv(Convolution):
    """`y = conv(x, W) + bias` with a packed `W [O, C / groups, ...]`: stands where a conv stood.

    The weight is frozen: x gets its gradient, the weight none. Under autocast x is cast first, as `nn.Conv2d` does.

    Args:
        weight: packed, of shape (O, C / groups * taps), rows in the order that `conv_rows` gives; or the packed
            convolution that this one is tied to.
        geometry: as `geometry_of` gives it, plain JSON values.
        filter: `W.shape[1:]`.
        bias: `[O]`.
        dtype: of `.weight`; default: that of the bias, or fp32.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight | Packed,
        geometry: dict[str, Any],
        filter: Sequence[int],
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, dtype or (torch.float32 if bias is None else bias.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_geometry(geometry, filter)

    @classmethod
    def empty(
        cls,
        format: PackedFormat,
        geometry: dict[str, Any],
        filter: Sequence[int],
        bias: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Makes the layer with tensors of the right shapes that are still to be filled; device may be "meta"."""
        offset = torch.empty(format.shape[0], dtype=dtype, device=device) if bias else None
        return cls(format.empty(device), geometry, filter, offset, dtype)

    def unprepared(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input)
        return super().unprepared(input if dtype is None else input.to(dtype))

    def run(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        added = values(residual)
        ready = self.prepared_call(x, activation, None if residual is None else residual.dtype)
        return self.convolve(values(x), self.bias, added, activation) if ready is None else ready(x, added)

    def prepared_call(self, x: Tensor, activation: str, residual: torch.dtype | None = None) -> PreparedConv | None:
        kind, bias = kind_of(x), self._parameters.get("bias")  # past the slow look-up of modules
        if kind is None or (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
            return None
        owner = () if self.owner is self else (self.owner,)
        key = (kind, activation, residual, self.channels_last, bias)
        ready: PreparedConv | None = cached(self, key, owner, self._prepare, x, activation, residual)
        return ready

    def _prepare(self, x: Tensor, activation: str, residual: torch.dtype | None) -> PreparedConv | None:
        return self.prepare_floats(x, activation, residual, values) if self.may_prepare_for(x) else None

    def extra_repr(self) -> str:
        return f"{(self.shape[0], *self.filter)}, stride={self.geometry['stride']}, {super().extra_repr()}"
