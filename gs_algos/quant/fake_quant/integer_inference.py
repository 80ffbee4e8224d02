"""Runs trained layers on whole numbers in eval mode, so that they agree with their converted form bit for bit.

In eval mode, a layer whose input is on a grid multiplies centered codes, codes less their zero points: in fp32, where
sums of whole numbers are exact in any order as long as they stay below 2**24. What follows them has the order of
`gs_kernels.qconv2d_int8`: scale of the weight, scale of the input, bias. The batch norm behind is folded into scale and
bias; the norm then returns what the layer computed.

Where weight and input have 8 bits, a bias is a whole number of the sums' steps, as the int32 biases of integer engines
are (Jacob et al. 2018, arXiv:1712.05877, section 2.4); wider steps would move it too far.

With gradients enabled the values are the same, and the gradients those of the fake-quantized floats beside them.
Training, and inference under autocast, in another dtype than fp32 or compiled, stay with fake-quantized floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.quant.fake_quant.batch_norm import (
    PrecomputedBatchNorm,
    affine,
    attach_normalized,
    move_normalized,
    running_mean,
    running_sigma,
    with_values,
)
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.scheme import Scheme
from gs_kernels.runtime.torch_private import _BatchNorm

WHOLE = 2**24  # fp32 holds every whole number up to here


class IntegerEval(nn.Module):
    """Lets a fake-quantized or searched layer run on integers in eval. Mixed in front of the layer's own class."""

    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    bias: Tensor | None
    _bn: tuple[_BatchNorm, ...] = ()  # in a tuple: a module attribute would register the batch norm a second time

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiplies x with a weight `[O, ...]`, as the float layer does, and adds the bias."""
        raise AssertionError("every IntegerEval layer has a product")

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def weight_scheme(self) -> Scheme | LevelGrid:
        """Returns the grid of the weight."""
        raise AssertionError("every IntegerEval layer has a weight")

    def centered_weight(self) -> tuple[Tensor, Tensor] | None:
        """Returns the weight's centered codes `[O, ...]` and scales `[O]` fp32; None unless a row has one."""
        raise AssertionError("every IntegerEval layer has a weight")

    def slope(self, bn: _BatchNorm) -> Tensor:
        """Returns the factor `[O]` fp32 that the batch norm applies to the quantized product in eval mode."""
        return affine(bn)[0] / running_sigma(bn)

    def unfolded(self, scale: Tensor) -> Tensor:
        """Returns the scales `[O]` without what a fold in training took from the batch norm."""
        return scale

    def epilogue(self, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
        """Returns fp32 (slope, bias) `[O]`: `BN(conv(x, W) + b) = slope * conv(x, W_quantized) + bias` in eval mode."""
        gamma, beta = affine(bn)
        offset = -running_mean(bn) if self.bias is None else self.bias.float() - running_mean(bn)
        return self.slope(bn), beta + gamma / running_sigma(bn) * offset

    def evaluated(self, x: Tensor, on_floats: Callable[[Tensor], Tensor]) -> Tensor:
        """Computes the layer by `on_floats`, or on integers with the gradients that `on_floats` has."""
        if self.training:
            return on_floats(x)
        with torch.no_grad():
            whole = self._on_integers(x)
        if whole is None:
            return on_floats(x)
        if not torch.is_grad_enabled():
            return whole
        y = on_floats(x)
        return move_normalized(whole, with_values(y, whole)) if y.requires_grad else whole

    def _on_integers(self, x: Tensor) -> Tensor | None:
        """Computes the layer, and attaches the output of its batch norm; None where floats must be multiplied."""
        bn = self._bn[0] if self._bn else None
        weight = self.centered_weight() if self._runs_on_integers(x, bn) else None
        quantizer = self.input_quantizer
        if weight is None or quantizer is None:
            return None
        (steps, scale), (x_scale, _) = weight, quantizer.grid()
        sums = self.product(centered_codes(quantizer(x), x_scale), steps)
        slope, bias = (1.0, self.bias) if bn is None else self.epilogue(bn)
        folded, axes = scale * slope, (-1, *[1] * (steps.dim() - 2))
        if bias is not None and rounds_bias(self.weight_scheme(), quantizer.scheme):
            bias = rounded_bias(bias, folded, x_scale)
        if not isinstance(bn, PrecomputedBatchNorm):
            return from_sums_(sums, folded, x_scale, bias, axes)
        y = from_sums_(sums.clone(), folded, x_scale, bias, axes)
        raw = from_sums_(sums, self.unfolded(scale), x_scale, self.bias, axes)
        # a tensor of inference mode does not tell that a hook changed it
        return raw if raw.is_inference() and self._forward_hooks else attach_normalized(raw, bn, y)

    def _runs_on_integers(self, x: Tensor, bn: _BatchNorm | None) -> bool:
        quantizer: Any = self.input_quantizer
        learns = self.training or (bn is not None and bn.training)
        floats = learns or x.is_meta or torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32
        floats = floats or torch.compiler.is_compiling()
        # a batch norm that is sharded apart from its layer is whole only in its own forward
        floats = floats or (bn is not None and hasattr(bn.weight, "full_tensor"))
        return not floats and quantizer is not None and quantizer.active and quantizer.gate is None


def from_sums_(sums: Tensor, scale: Tensor, x_scale: Tensor, bias: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """Computes `sums * scale * x_scale + bias`, in this order and in place; axes: of `[O]` beside sums."""
    sums.mul_(scale.view(axes)).mul_(x_scale)
    return sums if bias is None else sums.add_(bias.float().view(axes))


def centered_codes(values: Tensor, scale: Tensor) -> Tensor:
    """Divides values on a grid by its scale, exactly: to the half steps that zero points come in. NaN stays NaN."""
    return (values / (0.5 * scale)).round_().mul_(0.5)


def rounds_bias(weight: Scheme | LevelGrid, x: Scheme) -> bool:
    """Says whether the bias of a layer with these grids is rounded to whole steps of its sums."""
    return weight.bits == x.bits == 8


def rounded_bias(bias: Tensor, scale: Tensor, x_scale: Tensor) -> Tensor:
    """Rounds the bias `[O]` fp32 to whole steps of the sums, `scale * x_scale`; larger than 2**24 steps it stays."""
    step = scale * x_scale
    count = torch.round(bias.float() / step)
    return torch.where(count.abs() < WHOLE, count * step, bias.float())
