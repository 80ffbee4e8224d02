"""Defines the base of convolutions with a packed weight: the order of a row, the geometry and the kernel call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from gs_algos.quant.integer.prepared_call import PreparedConv
from gs_algos.quant.integer.quantized_tensor import (
    DeferredOutput,
    Like,
    QuantizedTensor,
    may_return_int8,
    plain,
)
from gs_algos.quant.memory_format import CHANNELS_LAST, laid, strides_in, suggested
from gs_algos.quant.packed.module import Packed
from gs_kernels import PackedWeight, dequantize_packed, pack_codes, qconv2d, unpack_codes
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.for_layers import make_geometry, prepared_qconv2d
from gs_kernels.pack.checks import FLOATS

DENSE = {2: F.conv1d, 3: F.conv2d, 4: F.conv3d}  # by the axes of a filter


class Convolution(Packed):
    """Convolves with a packed weight `[O, K]` whose rows are filters, channels fastest: K is (taps, C / groups).

    Filters with several scales in a row keep the order (C / groups, taps) of the float layer, in which they were
    trained, and are dequantized in each forward, as those of three dimensions are.

    A CPU keeps beside the packed weight what it convolves with, once a forward has made it: the weight in the dtype of
    x, or int8 codes. A GPU reads the packed weight.

    A picture with its channels first, as it comes into a network, needs no `.contiguous`: a GPU's kernels read it as it
    lies; a CPU copies it to have the channels last, floats inside ATen's convolution, and on integers its 8-bit codes.

    The result has the strides that the float layer's has: channels-last where the image or the float weight is. It is
    computed with its channels last, and copied where that is not wanted, unless a layer reads it.
    """

    bias: Tensor | None
    geometry: dict[str, Any]
    filter: tuple[int, ...]
    activation = "none"  # that is computed in the same call
    defers_add = False  # whether the layer waits for the add behind it, to compute it in the same call
    output_as_it_lies = False  # whether the result keeps its memory order: only layers read it
    channels_last = False  # whether the float layer's weight is: then its result is, whatever the image
    notes: tuple[str, ...] = ()  # what could run in the same call and does not, with the reason

    def set_geometry(self, geometry: dict[str, Any], filter: Sequence[int]) -> None:
        """Sets the geometry, as `geometry_of` gives it; filter: the float weight's shape behind its first axis."""
        if math.prod(filter) != self.shape[1]:
            who = type(self).__name__
            raise ValueError(f"{who}: filter must have the {self.shape[1]} elements of a row, got {list(filter)}")
        self.geometry, self.filter = geometry, tuple(filter)
        # what a forward may read of a conv: padding as TensorFlow has it, lengths of a mask
        self.out_channels, self.in_channels = self.shape[0], self.filter[0] * geometry["groups"]
        self.kernel_size, self.groups = self.filter[1:], geometry["groups"]
        for key in ("stride", "padding", "dilation"):
            setattr(self, key, geometry[key] if isinstance(geometry[key], str) else tuple(geometry[key]))

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized weight `[O, C / groups, ...]`, made anew at each access."""
        rows = dequantize_packed(self.packed, self.dtype)
        if not channels_fastest(self.group_size, self.filter):
            return rows.view(-1, *self.filter)
        return rows.view(-1, *self.filter[1:], self.filter[0]).movedim(-1, 1).contiguous()

    def refusals(self) -> list[str]:
        """Lists why the packed convolution cannot run; empty if it can."""
        reasons = ["no packed convolution in three dimensions"] if len(self.filter) == 4 else []
        return reasons + ([] if channels_fastest(self.group_size, self.filter) else ["a filter has several scales"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # what `.to(memory_format=...)` does to the weight of a float layer, and `.to(device)` does not
        into = CHANNELS_LAST[4] if self.channels_last else torch.contiguous_format
        self.channels_last = is_channels_last(fn(torch.empty((1, 2, 2, 2), device="cpu").to(memory_format=into)))
        return self

    def path(self) -> str:
        refusals = self.refusals()
        path = f"dequantizes: {', '.join(refusals)}" if refusals else super().path()
        fused = self.activation if self.activation != "none" else "add" if self.defers_add else ""
        return f"{path} + {fused}" if fused else path

    def forward(self, input: Tensor) -> Tensor:
        ready = self.prepared_call(input, self.activation)
        if ready is None:
            return self.unprepared(input)
        if self.defers_add:
            return DeferredOutput(_DeferredConv(self, input), ready.like)
        y = ready(input)
        if ready.grid is not None:
            return QuantizedTensor.of(y, ready.grid, ready.like)
        if type(y) is QuantizedTensor:  # by its output quantizer
            return QuantizedTensor.of(y.codes, y.quantizer, ready.like)
        return DeferredOutput.of(y, ready.like[1]) if self.output_as_it_lies else plain(y, ready.like[1])

    def unprepared(self, input: Tensor) -> Tensor:
        """Computes `forward` where nothing is prepared: under tracers and gradients, and in ways that cannot be."""
        if self.defers_add and self._can_defer(input):
            return DeferredOutput(_DeferredConv(self, input), self._like(input))
        y = self.run(input, None, self.activation)
        strides = self.strides(input, y.shape)
        if self.output_as_it_lies and type(y) is Tensor and self._can_defer(input):
            return DeferredOutput.of(y, strides)
        return (
            QuantizedTensor(y.codes, y.quantizer, y.dtype, strides)
            if isinstance(y, QuantizedTensor)
            else laid(y, strides)
        )

    def prepared_call(self, x: Tensor, activation: str, residual: torch.dtype | None = None) -> PreparedConv | None:
        """Returns the prepared call for images like x, and residuals of this dtype; None if there is none."""
        raise AssertionError("every convolution prepares calls")

    def prepare_floats(
        self,
        x: Tensor,
        activation: str,
        residual: torch.dtype | None,
        operand: Callable[[Tensor], Tensor],
        output: Callable[[Tensor], Tensor] | None = None,
    ) -> PreparedConv | None:
        """Prepares `act(conv(x) + residual)` on the floats that `operand` makes of images like x."""
        if self.refusals():
            return None
        size = self.image_size(x)
        image = torch.empty(size, dtype=x.dtype, device=x.device)
        convolution = prepared_qconv2d(image, self.packed, self.bias, **self.window(), activation=activation)
        if convolution is None:
            return None
        return PreparedConv(self.of_images(convolution.at(size, residual)), operand, output, None, self._like(x))

    @property
    def may_prepare(self) -> bool:
        """Says whether calls with images `[B, C, H, W]`, or signals `[B, C, L]`, can be prepared."""
        return len(self.filter) in (2, 3) and self.geometry["padding_mode"] == "zeros"

    def may_prepare_for(self, x: Tensor) -> bool:
        """Says whether calls with images like x can be prepared."""
        return self.may_prepare and self._batched(x) and x.numel() > 0 and x.dtype in FLOATS

    def run(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """Computes the layer with its epilogue: `act(conv(x) + residual)`."""
        raise AssertionError("every convolution runs")

    def geometry_for(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Returns x as `[B, C, H, W]`, padded if not by zeros, and the geometry for `qconv2d`; see `like_input`."""
        window = self.window()
        x = self._padded(x if self._batched(x) else x.unsqueeze(0))[0]
        return self.as_image(x), window

    def as_image(self, x: Tensor) -> Tensor:
        """Returns a batch of images, or of signals as images of one line."""
        return x.unsqueeze(2) if len(self.filter) == 2 else x

    def window(self) -> dict[str, Any]:
        """Returns the geometry for `qconv2d`; padding other than by zeros is done beforehand."""
        g, zeros = self.geometry, self.geometry["padding_mode"] == "zeros"
        left = g["padding"] if zeros and g["padding"] != "valid" else 0
        padding = tuple(left) if isinstance(left, list) else left
        window: dict[str, Any] = {"stride": tuple(g["stride"]), "padding": padding, "dilation": tuple(g["dilation"])}
        window |= {"kernel_size": tuple(self.kernel_size), "groups": g["groups"]}
        if len(self.filter) == 2:
            flat = {"stride": 1, "padding": 0, "dilation": 1, "kernel_size": 1}
            window |= {key: (flat[key], *window[key]) for key in flat if isinstance(window[key], tuple)}
        return window

    def image_size(self, x: Tensor) -> tuple[int, ...]:
        """Returns the size `[B, C, H, W]` of what `qconv2d` takes for a batch x; a signal is an image of one line."""
        return tuple(x.shape) if len(self.filter) == 3 else (*x.shape[:2], 1, x.shape[2])

    def of_images(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns what convolves inputs of this layer, given what convolves images of `image_size`."""
        if len(self.filter) == 3:
            return run

        def convolve(x: Tensor, residual: Tensor | None = None, *grid: Tensor | None) -> Tensor:
            added = () if residual is None else (residual.unsqueeze(2), *grid)
            return run(x.unsqueeze(2), *added).squeeze(2)

        return convolve

    def like_input(self, y: Tensor, x: Tensor) -> Tensor:
        """Gives y `[B, O, P, Q]` the axes that the layer's input x has."""
        y = y.squeeze(2) if len(self.filter) == 2 else y
        return y if self._batched(x) else y.squeeze(0)

    def convolve(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
        """Computes `act(conv(x, W) + bias + residual)` on floats; x `[B, C, ...]` or, without residual, `[C, ...]`."""
        if self.refusals():
            y = self._convolve_dense(x, bias)
            return ACTIVATIONS[activation].function(y if residual is None else y + residual)
        image, geometry = self.geometry_for(x)
        added = None if residual is None else self.as_image(residual)
        epilogue: dict[str, Any] = {"residual": added, "activation": activation, "keep_dense": True}
        return self.like_input(qconv2d(image, self.packed, bias, **geometry, **epilogue), x)

    def _can_defer(self, x: Tensor) -> bool:
        return self.may_prepare and self._batched(x) and may_return_int8(x)

    def strides(self, x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the strides that the float layer's result for x has, for a result of this shape."""
        if len(self.filter) == 2:
            return strides_in(shape, torch.contiguous_format)
        batched = self._batched(x)
        batch = (x.shape, x.stride()) if batched else ((1, *x.shape), (x.shape[0] * x.stride(0), *x.stride()))
        memory_format = CHANNELS_LAST[len(self.filter) + 1] if self.channels_last else suggested(*batch)
        return strides_in(shape, memory_format) if batched else strides_in((1, *shape), memory_format)[1:]

    def _like(self, x: Tensor) -> Like:
        """Returns shape, strides, dtype and device of the result for x."""
        p, q = make_geometry("Convolution", **self.window()).output(*self.image_size(x)[2:])
        shape = (x.shape[0], self.shape[0], *((q,) if len(self.filter) == 2 else (p, q)))
        return shape, self.strides(x, shape), x.dtype, x.device

    def _convolve_dense(self, x: Tensor, bias: Tensor | None) -> Tensor:
        g, (image, padding) = self.geometry, self._padded(x)
        offset = None if bias is None else bias.to(x.dtype)
        conv = DENSE[len(self.filter)]
        return conv(image, self.weight.to(x.dtype), offset, g["stride"], padding, g["dilation"], g["groups"])

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """Returns x, padded if not by zeros, and the padding that is left to do."""
        g = self.geometry
        if g["padding_mode"] != "zeros":
            return F.pad(x, g["pad"], mode=g["padding_mode"]).to(x.dtype), 0  # autocast pads in fp32
        return x, g["padding"] if isinstance(g["padding"], str) else tuple(g["padding"])

    def _batched(self, x: Tensor) -> bool:
        return x.dim() == len(self.filter) + 1


class _DeferredConv:
    """Computes a deferred convolution, with the residual and activation that joined it."""

    adds = True
    activations = tuple(ACTIVATIONS)
    to_grid = False

    def __init__(self, layer: Convolution, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __call__(self, residual: Tensor | None, activation: str, grid: Any) -> Tensor:
        return self.layer.run(self.x, residual, activation)


def channels_fastest(group_size: int, filter: Sequence[int]) -> bool:
    """Says whether rows are stored with their channels fastest: those with one scale, or one tap."""
    k = math.prod(filter)
    return group_size == k or k == filter[0]


@torch.no_grad()
def conv_rows(weight: PackedWeight, filter: Sequence[int]) -> PackedWeight:
    """Reorders a canonical weight from the float layer's order, (C / groups, taps), to that of `Convolution`.

    filter: the float weight's shape behind its first axis; the rows of a linear, (K,), stay as they are.
    """
    if not channels_fastest(weight.group_size, filter) or filter[0] in (1, math.prod(filter)):
        return weight
    codes = unpack_codes(weight.codes, weight.bits, weight.shape).view(-1, filter[0], math.prod(filter[1:]))
    return replace(weight, codes=pack_codes(codes.transpose(1, 2).flatten(1), weight.bits))


def is_channels_last(weight: Tensor) -> bool:
    """Says whether a float convolution with this weight gives a channels-last result, whatever the image."""
    return suggested(weight.shape, weight.stride()) != torch.contiguous_format


def geometry_of(conv: nn.Module) -> dict[str, Any]:
    """Returns stride, padding, dilation and groups of a `nn.Conv*d` as plain JSON values."""
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)  # type: ignore[arg-type]
    return {
        "stride": list(conv.stride),  # type: ignore[arg-type]
        "padding": padding,
        "dilation": list(conv.dilation),  # type: ignore[arg-type]
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
        "pad": list(conv._reversed_padding_repeated_twice),  # type: ignore[arg-type]
    }
