"""Turns live `nn.Linear` and `nn.Conv*d` into fake-quantized layers: their class is swapped, their parameters stay.

A swapped layer gains up to three children: `input_quantizer`, `weight_quantizer`, `output_quantizer`. With a batch norm
behind it (Jacob et al. 2018, arXiv:1712.05877, section 3.2; Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2):

- `none`: `y = BN(conv(x, FQ(W)))`; folded at convert.
- `one_conv`: `y = BN(conv(x, FQ(W * f)) / f)`, f = gamma / sigma.
- `two_conv`: `conv(x, W)` gives the batch statistics mu_b, sigma_b, and with the running ones mu_r, sigma_r
  `y = conv(x, FQ(W * f)) * sigma_r / sigma_b + beta - gamma * mu_b / sigma_b`;
  once frozen, and in eval, `y = conv(x, FQ(W * f)) + beta - gamma * mu_r / sigma_r`.

sigma_r is read from the batch norm at each optimizer step (`refresh`), so a recomputed forward repeats itself exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.core.modules import swapped_class
from gs_algos.core.tensor_rules import POSITIVE, Rules
from gs_algos.quant.fake_quant.batch_norm import (
    BypassedBatchNorm,
    Freezable,
    PrecomputedBatchNorm,
    affine,
    per_channel,
    running_mean,
    running_sigma,
    swap_norm,
    update_running,
)
from gs_algos.quant.fake_quant.integer_inference import IntegerEval, centered_codes
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, WeightQuantizer
from gs_algos.quant.integer.quantized_tensor import DeferredOutput
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.scheme import Scheme
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.runtime.torch_private import _BatchNorm, function_modes

SMALLEST_FACTOR = 1e-6  # a zero gamma (zero-initialized residual branches) must not divide by zero
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
JOINED = {a.module: name for name, a in ACTIVATIONS.items() if a.cpp}  # activations that a sum of codes takes along


class FakeQuantized(IntegerEval):
    """Rounds the weight, and input or output, of a layer; mixed in front of the layer's own class."""

    prefix = "FakeQuant"
    weight_quantizer: WeightQuantizer
    weight: Tensor
    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_output(self.evaluated(input, self.on_floats))

    def on_floats(self, x: Tensor) -> Tensor:
        """Computes the layer from fake-quantized floats."""
        return self.product(self.quantized_input(x), self.weight_quantizer(self.weight), self.bias)

    def folded_weight(self) -> Tensor:
        """Returns the float weight that is quantized in eval mode, batch norm folded in where the layer does so."""
        return self.weight

    def weight_scheme(self) -> Scheme:
        return self.weight_quantizer.scheme

    def centered_weight(self) -> tuple[Tensor, Tensor] | None:
        quantizer, rows = self.weight_quantizer, self.weight.shape[0]
        if quantizer.gate is not None or quantizer.scale.numel() not in (1, rows):
            return None
        weight = self.folded_weight()
        scale = quantizer.qparams(weight)[0].expand(rows)
        return centered_codes(quantizer(weight), scale.view(-1, *[1] * (weight.dim() - 1))), scale


class _FakeQuantLinear(FakeQuantized):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class _FakeQuantConv(FakeQuantized):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class Folded(_FakeQuantConv):
    """Multiplies its weight by f = gamma / sigma before quantizing it; `sigma [O]` is that of the last step."""

    sigma: Tensor

    def state_rules(self) -> Rules:
        return {"sigma": POSITIVE}

    def batch_norm(self) -> _BatchNorm:
        return self._bn[0]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes sigma from the batch norm's running variance. Called by the algorithm between two steps."""
        self.sigma.copy_(running_sigma(self.batch_norm()))

    def factor(self) -> tuple[Tensor, Tensor]:
        """Returns (f, ratio) `[O]` fp32: f is gamma / sigma kept off zero, ratio = gamma / sigma / f remains to apply.

        sigma is as of the last step in training, and the batch norm's own in eval. ratio is 1 except where gamma is ~0.
        """
        bn = self.batch_norm()
        sigma = self.sigma if self.training else running_sigma(bn)
        f = (torch.ones_like(sigma) if bn.weight is None else bn.weight.float()) / sigma
        small = f.abs() < SMALLEST_FACTOR
        least = torch.full_like(f, SMALLEST_FACTOR)
        floor = torch.where(f < 0, -least, least)
        return torch.where(small, floor, f), torch.where(small, f / floor, torch.ones_like(f))

    def folded_weight(self) -> Tensor:
        f, _ = self.factor()
        return scaled_rows(self.weight, f)

    def slope(self, bn: _BatchNorm) -> Tensor:
        return self.factor()[1]

    def _folded_conv(self, x: Tensor, f: Tensor) -> Tensor:
        return self.product(x, self.weight_quantizer(scaled_rows(self.weight, f)))


class _OneConvFolded(Folded):
    prefix = "OneConvFolded"

    def unfolded(self, scale: Tensor) -> Tensor:
        return scale / self.factor()[0]

    def on_floats(self, x: Tensor) -> Tensor:
        # multiplied in and divided out again: only the grid sees f, so no gradient has to go through it
        f = self.factor()[0].detach()
        y = self._folded_conv(self.quantized_input(x), f)
        y = y / per_channel(f, y)
        return y if self.bias is None else y + per_channel(self.bias, y)


class _TwoConvFolded(Folded):
    prefix = "TwoConvFolded"
    frozen: Tensor  # bool [1]

    def on_floats(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        bn = self.batch_norm()
        f, ratio = self.factor()
        y = self._folded_conv(x, f)
        sigma, mean = running_sigma(bn), running_mean(bn)
        if self.training and y.numel():
            batch_mean, batch_sigma = self._batch_statistics(x)
            used = torch.where(self.frozen, sigma, batch_sigma)
            mean = torch.where(self.frozen, mean, batch_mean)
            ratio = ratio * (self.sigma / used)
            sigma = used
        gamma, beta = affine(bn)
        bias = beta - gamma * mean / sigma
        if self.bias is not None:
            bias = bias + gamma * self.bias.float() / sigma
        return y * per_channel(ratio, y) + per_channel(bias, y)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (mean, sigma) `[O]` fp32 of conv(x, W) + b in floats; updates the running ones unless frozen."""
        y = self._conv_forward(x, self.weight, self.bias).float()
        bn = self.batch_norm()
        axes = [0, *range(2, y.dim())]
        var, mean = torch.var_mean(y, axes, correction=0)
        update_running(bn, mean.detach(), var.detach(), y.numel() // y.shape[1], self.frozen)
        return mean, (var + bn.eps).sqrt()


class _QuantizedOutput(nn.Module):
    """Quantizes the output of a live module, because an add or concat reads it."""

    prefix = "OutputQuantized"
    output_quantizer: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        quantizer: Any = self._modules["output_quantizer"]
        if type(quantizer) is StaticQuantizer and len(args) == 1 and type(args[0]) is DeferredOutput:
            name = JOINED.get(type(self).__bases__[1])  # a class of torch.nn, and no forward of the user's
            if name is not None and not self.inplace and not function_modes():
                return quantizer(args[0], name)  # type: ignore[no-any-return]
        return quantizer(super().forward(*args, **kwargs))  # type: ignore[no-any-return]


def scaled_rows(weight: Tensor, f: Tensor) -> Tensor:
    """Returns `weight [O, ...] * f [O]`."""
    return weight * f.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


def swap_layer(
    layer: Any,
    weight: WeightQuantizer,
    input: ActivationQuantizer | None,
    output: ActivationQuantizer | None,
    bn: _BatchNorm | None = None,
    fold: str = "none",
    freezable: bool = False,
    norm_children: tuple[nn.Module, ...] = (),
) -> None:
    """Turns a live Linear or Conv into its fake-quantized class, and its batch norm into what the fold mode needs.

    norm_children: the children of the batch norm that run behind it.
    """
    mixin: type[nn.Module] = _FakeQuantLinear if isinstance(layer, nn.Linear) else _FakeQuantConv
    if bn is not None and fold != "none":
        mixin = _OneConvFolded if fold == "one_conv" else _TwoConvFolded
        layer.register_buffer("sigma", running_sigma(bn).detach())
    layer.__class__ = swapped_class(mixin, type(layer))
    layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer = weight, input, output
    if bn is None:
        return
    layer._bn = (bn,)
    if fold == "two_conv" or freezable:
        holder = layer if fold == "two_conv" else bn
        holder.register_buffer("frozen", torch.zeros(1, dtype=torch.bool, device=running_mean(bn).device))
        swap_norm(bn, BypassedBatchNorm if fold == "two_conv" else Freezable, norm_children)
    if fold != "two_conv" and input is not None:
        swap_norm(bn, PrecomputedBatchNorm, norm_children)


def give_output_quantizer(module: Any, quantizer: ActivationQuantizer) -> None:
    """Makes a live module quantize its output, whatever it is."""
    if not isinstance(module, IntegerEval):
        module.__class__ = swapped_class(_QuantizedOutput, type(module))
    module.output_quantizer = quantizer


def class_given(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a live module had before `give_output_quantizer`."""
    return type(module).__bases__[1] if isinstance(module, _QuantizedOutput) else type(module)
