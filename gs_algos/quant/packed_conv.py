"""A convolution whose weight is packed codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from gs_algos.quant.packed import Packed, PackedFormat
from gs_kernels import PackedWeight


class PackedConv(Packed):
    """`y = conv(x, W) + bias` with a packed `W [O, C / groups, ...]`, its rows flattened: stands where a conv stood.

    The weight is frozen: x gets its gradient, the weight none. It is dequantized in each forward: no packed convolution
    yet. Under autocast x is cast first, as `nn.Conv2d` does.

    Args:
        weight: packed, of shape (O, C / groups * R * S).
        geometry: as `geometry_of` (gs_algos/quant/quantized.py) gives it, plain JSON values.
        filter: `W.shape[1:]`.
        bias: `[O]`.
        dtype: of `.weight`; default: that of the bias, or fp32.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        geometry: dict[str, Any],
        filter: Sequence[int],
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, dtype or (torch.float32 if bias is None else bias.dtype))
        if math.prod(filter) != self.shape[1]:
            raise ValueError(f"PackedConv: filter must have the {self.shape[1]} elements of a row, got {list(filter)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.geometry, self.filter = geometry, tuple(filter)
        self.out_channels, self.in_channels = self.shape[0], self.filter[0] * geometry["groups"]
        self.kernel_size, self.groups = self.filter[1:], geometry["groups"]
        self._conv = {2: F.conv1d, 3: F.conv2d, 4: F.conv3d}[len(self.filter)]

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
        """The layer with tensors of the right shapes that are still to be filled; device may be "meta"."""
        offset = torch.empty(format.shape[0], dtype=dtype, device=device) if bias else None
        return cls(format.empty(device), geometry, filter, offset, dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[O, C / groups, ...]`, made anew at each access."""
        return super().weight.view(self.shape[0], *self.filter)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        g, padding = self.geometry, self.geometry["padding"]
        if g["padding_mode"] != "zeros":
            x, padding = F.pad(x, g["pad"], mode=g["padding_mode"]), 0
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv(x, self.weight.to(x.dtype), bias, g["stride"], padding, g["dilation"], g["groups"])

    def extra_repr(self) -> str:
        return f"{(self.shape[0], *self.filter)}, stride={self.geometry['stride']}, {super().extra_repr()}"
