"""Converted layers: integer codes and scales, no float weight. What a trained fake-quantized layer becomes.

The linear runs in integer arithmetic where it can (int8 codes on both sides, int32 accumulation); otherwise, as the
convolutions until their integer kernel exists, it dequantizes its codes in each forward. `path()` says which and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.quant.quantizers import Quantizer
from gs_algos.quant.scheme import Scheme, n_scales
from gs_kernels import PerChannel, PerGroup, PerTensor, dequantize, fake_quant, quantize

INT_MM_DEVICES = ("cpu",)


class StaticQuantizer(nn.Module):
    """The frozen grid of one activation: scale `[1]`, zero `[1]` fp32, real = (q - zero) * scale."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scheme: Scheme, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("zero", torch.zeros(1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quant(x, self.scale, self.zero, qmin=self.scheme.qmin, qmax=self.scheme.qmax)

    @torch.no_grad()
    def take(self, quantizer: Quantizer) -> None:
        """Copies the grid of a trained quantizer."""
        scale, zero = quantizer.grid()
        self.scale.copy_(scale)
        self.zero.copy_(zero)

    def codes(self, x: Tensor) -> Tensor:
        """int8 (or uint8 for an unsigned grid) codes of x, same shape."""
        return quantize(x, self.scale, self.zero, qmin=self.scheme.qmin, qmax=self.scheme.qmax)

    def _apply(self, fn: Any, recurse: bool = True) -> StaticQuantizer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale, self.zero = self.scale.float(), self.zero.float()
        return self

    def extra_repr(self) -> str:
        return str(self.scheme)


class QuantizedLayer(nn.Module):
    """A weight as integers: weight = (codes - zero) * scale.

    codes `[O, ...]` int8 (uint8 if unsigned), scale, zero `[C]` fp32 (C = 1, O, or groups row-major), bias `[O]` fp32.
    A scale is negative where a batch norm with negative gamma was folded in afterwards.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    input_quantizer: StaticQuantizer | None
    output_quantizer: StaticQuantizer | None

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: Scheme,
        bias: bool,
        input: Scheme | None = None,
        output: Scheme | None = None,
        scales: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.granularity = scheme.granularity
        if isinstance(scheme.granularity, PerTensor) and scales not in (None, 1):
            self.granularity = PerChannel(0)  # one scale, times the batch norm folded into each channel
        n = scales if scales is not None else n_scales(self.granularity, shape)
        self.dtype = dtype
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8 if scheme.format.signed else torch.uint8))
        self.register_buffer("scale", torch.ones(n))
        self.register_buffer("zero", torch.zeros(n))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.input_quantizer = None if input is None else StaticQuantizer(input)
        self.output_quantizer = None if output is None else StaticQuantizer(output)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the dtype the float layer had. Made anew at each access."""
        return dequantize(self.codes, self.scale, self.zero, granularity=self.granularity, dtype=self.dtype)

    def nbytes(self) -> int:
        """Bytes that the weight takes at its bit width, scales and zero points included."""
        zeros = self.zero.numel() * 4 if bool(self.zero.any()) else 0
        return (self.codes.numel() * self.scheme.bits + 7) // 8 + self.scale.numel() * 4 + zeros

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.is_floating_point() and self.scale.dtype != torch.float32:
            self.dtype = self.scale.dtype
        self.scale, self.zero = self.scale.float(), self.zero.float()
        if self.bias is not None:
            self.bias = self.bias.float()
        return self

    def path(self) -> str:
        """Which arithmetic the layer runs in, and why."""
        raise AssertionError("every QuantizedLayer says its path")

    def _finish(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else self.output_quantizer(y)


class QuantizedLinear(QuantizedLayer):
    """`y = x @ weight^T + bias` on codes: int8 x int8 -> int32 on the CPU, dequantized elsewhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_features, self.in_features = self.codes.shape

    def integer_refusals(self, device: torch.device) -> list[str]:
        """Why the product cannot run on integers; empty if it can."""
        reasons = []
        if self.input_quantizer is None:
            reasons.append("activations are not quantized")
        elif not self.input_quantizer.scheme.format.signed:
            reasons.append("activation codes are unsigned")
        elif self.input_quantizer.scheme.bits == 1 and self.input_quantizer.scheme.symmetric:
            reasons.append("the activation grid has no level for 0")
        if not self.scheme.format.signed:
            reasons.append("weight codes are unsigned")
        if isinstance(self.granularity, PerGroup):
            reasons.append("scales are per group")
        if device.type not in INT_MM_DEVICES:
            reasons.append(f"no integer matmul for {device.type} yet")
        return reasons

    def path(self) -> str:
        reasons = self.integer_refusals(self.codes.device)
        return "integer: int8 x int8 -> int32" if not reasons else "dequantizes: " + ", ".join(reasons)

    def forward(self, x: Tensor) -> Tensor:
        if not self.integer_refusals(x.device):
            return self._finish(self._integer(x))
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._finish(F.linear(x, self.weight.to(x.dtype), bias))

    def _integer(self, x: Tensor) -> Tensor:
        """`((qx - zx) @ (qw - zw)^T) * (sx * sw) + bias`; sums in int32, one cast at the end."""
        quantizer = self.input_quantizer
        assert quantizer is not None
        codes = quantizer.codes(x.reshape(-1, x.shape[-1]))  # [M, K] int8
        acc = torch._int_mm(codes, self.codes.t())  # [M, N] int32
        acc = acc - quantizer.zero.int() * self.codes.sum(1, dtype=torch.int32)
        y = acc.float()
        # a weight grid without a 0 has a zero point of one half: its share is zw * sum(qx - zx)
        centred = codes.sum(1, dtype=torch.int32, keepdim=True) - x.shape[-1] * quantizer.zero.int()
        y = (y - centred.float() * self.zero) * (quantizer.scale * self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class QuantizedConv(QuantizedLayer):
    """`y = conv(x, weight) + bias` with the geometry of the layer it replaces; dequantizes in each forward."""

    def __init__(self, geometry: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = geometry
        # what a forward may read of a conv: padding as TensorFlow has it, lengths of a mask
        self.out_channels, self.in_channels = self.codes.shape[0], self.codes.shape[1] * geometry["groups"]
        self.kernel_size = tuple(self.codes.shape[2:])
        for key in ("stride", "padding", "dilation"):
            setattr(self, key, geometry[key] if isinstance(geometry[key], str) else tuple(geometry[key]))
        self.groups = geometry["groups"]
        self._conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.codes.dim()]

    def path(self) -> str:
        return "dequantizes: no integer convolution yet"

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        g, padding = self.geometry, self.geometry["padding"]
        if g["padding_mode"] != "zeros":
            x, padding = F.pad(x, g["pad"], mode=g["padding_mode"]), 0
        y = self._conv(x, self.weight.to(x.dtype), bias, g["stride"], padding, g["dilation"], g["groups"])
        return self._finish(y)

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, {self.scheme}, stride={self.geometry['stride']}"


def geometry_of(conv: nn.Module) -> dict[str, Any]:
    """stride, padding, dilation, groups of a `nn.Conv*d`, as plain JSON values."""
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)  # type: ignore[arg-type]
    return {
        "stride": list(conv.stride),  # type: ignore[arg-type]
        "padding": padding,
        "dilation": list(conv.dilation),  # type: ignore[arg-type]
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
        "pad": list(conv._reversed_padding_repeated_twice),  # type: ignore[arg-type]
    }
