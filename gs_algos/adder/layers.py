"""Computes with sums of absolute differences where a convolution multiplies: in training, and with 8-bit codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.quant.fixed_dtype import FixedDtypeBuffers
from gs_algos.quant.integer.prepared_call import PREPARED, cached, kind_of
from gs_algos.quant.integer.quantized_tensor import plain, values
from gs_algos.quant.memory_format import strides_in
from gs_kernels import adder_conv2d, adder_int8, choose_qparams
from gs_kernels.for_layers import is_dense, make_grid, noted, prepared_adder_int8, to_codes_of
from gs_kernels.pack.checks import FLOATS, dtype_name

LOWEST, HIGHEST = -128, 127
MOMENTUM = 0.1  # of what a batch tells of the range of inputs


class _ScaledGradient(torch.autograd.Function):
    """Gives a weight on as it is; its gradient comes back with a norm of `eta * sqrt(numel)`, zeros as zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eta: float) -> Tensor:
        ctx.eta = eta
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        norm = torch.linalg.vector_norm(dw, dtype=torch.float32)
        factor = ctx.eta * dw.numel() ** 0.5 / norm
        return dw * torch.where(norm > 0, factor, torch.zeros_like(factor)).to(dw.dtype), None


class _OnGrid(torch.autograd.Function):
    """Computes an adder convolution of x and weight rounded to one grid, exactly: `-scale * sum |codes - codes|`.

    Gradients are those of the adder convolution of the rounded values, where they are inside of the grid; 0 outside.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight, scale, zero)
        ctx.geometry = geometry
        codes, filters = (to_codes(t, scale, zero) - zero for t in (x, weight))
        return (adder_conv2d(codes, filters, *geometry) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, zero = ctx.saved_tensors
        with torch.enable_grad():
            real = [
                ((to_codes(t, scale, zero) - zero) * scale).to(t.dtype).requires_grad_(needed)
                for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False)
            ]
            y = adder_conv2d(*real, *ctx.geometry)
            wanted = [t for t in real if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy))
        low, high = ((end - zero) * scale for end in (LOWEST - 0.5, HIGHEST + 0.5))
        grads = [
            next(found) * ((t >= low) & (t <= high)) if r.requires_grad else None
            for t, r in zip((x, weight), real, strict=True)
        ]
        return *grads, None, None, None


def to_codes(t: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rounds to codes of a grid, as fp32 and as `quantize` does: `clamp(round(t * (1 / scale)) + zero, -128, 127)`."""
    return (torch.round(t.float() * (1.0 / scale)) + zero).clamp(LOWEST, HIGHEST)


def _codes(t: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return to_codes(t, scale, zero).to(torch.int8)


class AdderLayer(nn.Module):
    """Makes of a live convolution `y = -sum |x - w| + bias`, by a swap of its class.

    adder_site: its name in the network, for messages. adder_eta: of the gradient. On a grid there are `input_low` and
    `input_high`, `[1]`, the range of inputs.
    """

    prefix = "Adder"  # of the class's name
    adder_site: str
    adder_eta: float
    on_grid: bool
    weight: Tensor
    bias: Tensor | None
    input_low: Tensor
    input_high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        for what, t in (("input", x), ("weight", self.weight)):
            if t.dtype not in FLOATS:
                raise TypeError(
                    f"Adder: the {what} of {self.adder_site} must be float32 / float16 / bfloat16, got "
                    f"{dtype_name(t.dtype)}; cast the network and its inputs, with .float() for example"
                )
        scaled = torch.is_grad_enabled() and self.weight.requires_grad
        weight = _ScaledGradient.apply(self.weight, self.adder_eta) if scaled else self.weight
        if self.on_grid:
            if self.training:
                self.observe(x)
            y = _OnGrid.apply(x, weight, *self.grid(), self._geometry())
        else:
            y = adder_conv2d(x, weight, *self._geometry())
        return y if self.bias is None else y + self.bias[:, None, None]

    def _geometry(self) -> tuple[Any, Any, Any]:
        conv: Any = self
        return conv.stride, conv.padding, conv.dilation

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Moves the range towards that of a batch; the first one sets it. One that is not finite counts for nothing."""
        if not x.numel():
            return
        low, high = (t.float().view(1) for t in torch.aminmax(x.detach()))
        first = self.input_high < self.input_low
        for held, new in ((self.input_low, low), (self.input_high, high)):
            moved = torch.where(first, new, held + MOMENTUM * (new - held))
            held.copy_(torch.where((high - low).isfinite(), moved, held))

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """Returns the (scale, zero point) of the grid that inputs and weight share, `[1]` fp32."""
        low, high = (t.float().view(1) for t in torch.aminmax(self.weight.detach()))
        low, high = torch.minimum(low, self.input_low), torch.maximum(high, self.input_high)
        return choose_qparams(low, high, qmin=LOWEST, qmax=HIGHEST, symmetric=False)


class AdderConv2dInt8(FixedDtypeBuffers):
    """Computes `-scale * sum |codes of x - weight| + bias` of 8-bit codes on one grid, exactly.

    `Adder.convert` makes it.

    Args:
        conv: the convolution whose sizes it has.
    """

    fixed_dtype: ClassVar[tuple[str, ...]] = ("weight", "scale", "zero")
    weight: Tensor  # int8 [O, C, R, S]
    scale: Tensor  # fp32 [1]
    zero: Tensor  # fp32 [1], a whole number
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        device = conv.weight.device
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.register_buffer("weight", torch.zeros(conv.weight.shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("bias", None if conv.bias is None else torch.zeros_like(conv.bias))

    @torch.no_grad()
    def take(self, layer: AdderLayer) -> None:
        """Takes the weight of a trained layer, and its grid as it is now."""
        scale, zero = layer.grid()
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.weight.copy_(to_codes(layer.weight, scale, zero).to(torch.int8))
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = values(x)
        kind, bias = kind_of(x), self.bias
        ready = cached(self, kind, (), self._prepare, x) if kind is not None and x.numel() else None
        y = self._sums(adder_int8, _codes(x, self.scale, self.zero), x.dtype) if ready is None else ready(x)
        if bias is not None:
            y = noted(lambda y: y + bias[:, None, None], y)
        return plain(y, strides_in(y.shape, torch.contiguous_format))

    def _sums(self, function: Callable[..., Any], codes: Tensor, dtype: torch.dtype, **more: Any) -> Any:
        if dtype not in FLOATS:
            raise TypeError(
                "AdderConv2dInt8: the input must be float32 / float16 / bfloat16, got "
                f"{dtype_name(dtype)}; cast it first"
            )
        where: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return function(codes, self.weight, self.scale, zero=self.zero, dtype=dtype, **where, **more)

    def _prepare(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Returns what computes the sums of images like x, scaled; None where the device prepares nothing."""
        scale, zero = self.scale, self.zero
        nothing = {"bias": None, "activation": "none", "out_scale": None, "out_zero": None}
        compare = self._sums(prepared_adder_int8, _codes(x, scale, zero), x.dtype, **nothing)
        if compare is None:
            return None
        numbers, quantize = make_grid(scale, zero, LOWEST, HIGHEST).numbers, None
        if numbers is not None and is_dense(x) and x.dtype == torch.float32:
            quantize = to_codes_of(x.numel(), numbers.of_floats, numbers.moved)
        if quantize is None:
            return lambda x: compare(noted(_codes, x, scale, zero))
        return lambda x: compare(quantize(x))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != PREPARED}

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
