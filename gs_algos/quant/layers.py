"""Live layers with fake-quant inside: the class of a `nn.Linear` or `nn.Conv*d` is swapped, its parameters stay.

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

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gs_algos.quant.quantizers import ActivationQuantizer, WeightQuantizer

SMALLEST_FACTOR = 1e-6  # a zero gamma (zero-initialised residual branches) must not divide by zero
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FakeQuantized(nn.Module):
    """What every swapped layer shares. The class is mixed in front of the layer's own."""

    prefix = "FakeQuant"
    input_quantizer: ActivationQuantizer | None
    weight_quantizer: WeightQuantizer
    output_quantizer: ActivationQuantizer | None
    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[..., Tensor]

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def folded_weight(self) -> Tensor:
        """The float tensor whose quantized form the layer multiplies with, in eval mode."""
        return self.weight


class _FakeQuantLinear(FakeQuantized):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return self.quantized_output(F.linear(self.quantized_input(x), weight, self.bias))


class _FakeQuantConv(FakeQuantized):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return self.quantized_output(self._conv_forward(self.quantized_input(x), weight, self.bias))


class Folded(FakeQuantized):
    """A conv that multiplies its weight by f = gamma / sigma before quantizing it; `sigma [O]`: at the last step."""

    sigma: Tensor
    _bn: tuple[_BatchNorm]  # in a tuple: a module attribute would register the batch norm a second time

    def batch_norm(self) -> _BatchNorm:
        return self._bn[0]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes sigma from the batch norm's running variance. Called by the algorithm between two steps."""
        self.sigma.copy_(running_sigma(self.batch_norm()))

    def factor(self) -> tuple[Tensor, Tensor]:
        """(f, ratio) `[O]` fp32: f is gamma / sigma pushed away from zero, ratio = gamma / sigma / f remains to apply.

        sigma is as of the last step in training, and the batch norm's own in eval. ratio is 1 except where gamma is ~0.
        """
        bn = self.batch_norm()
        sigma = self.sigma if self.training else running_sigma(bn)
        f = (torch.ones_like(sigma) if bn.weight is None else bn.weight.float()) / sigma
        small = f.abs() < SMALLEST_FACTOR
        floor = torch.where(f < 0, -SMALLEST_FACTOR, SMALLEST_FACTOR)
        return torch.where(small, floor, f), torch.where(small, f / floor, torch.ones_like(f))

    def folded_weight(self) -> Tensor:
        f, _ = self.factor()
        return scaled_rows(self.weight, f)

    def _folded_conv(self, x: Tensor, f: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight_quantizer(scaled_rows(self.weight, f)), None)


class _OneConvFolded(Folded):
    prefix = "OneConvFolded"

    def forward(self, x: Tensor) -> Tensor:
        # multiplied in and divided out again: only the grid sees f, so no gradient has to go through it
        f = self.factor()[0].detach()
        y = self._folded_conv(self.quantized_input(x), f)
        y = y / per_channel(f, y)
        return y if self.bias is None else y + per_channel(self.bias, y)


class _TwoConvFolded(Folded):
    prefix = "TwoConvFolded"
    frozen: Tensor  # bool [1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        bn = self.batch_norm()
        f, ratio = self.factor()
        y = self._folded_conv(x, f)
        sigma, mean = running_sigma(bn), running_mean(bn)
        if self.training:
            batch_mean, batch_sigma = self._batch_statistics(x)
            used = torch.where(self.frozen, sigma, batch_sigma)
            mean = torch.where(self.frozen, mean, batch_mean)
            ratio = ratio * (self.sigma / used)
            sigma = used
        gamma, beta = affine(bn)
        bias = beta - gamma * mean / sigma
        if self.bias is not None:
            bias = bias + gamma * self.bias.float() / sigma
        return self.quantized_output(y * per_channel(ratio, y) + per_channel(bias, y))

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, sigma) `[O]` fp32 of conv(x, W) + b with float weights; moves the running ones, unless frozen."""
        y = self._conv_forward(x, self.weight, self.bias).float()
        bn = self.batch_norm()
        axes = [0, *range(2, y.dim())]
        var, mean = torch.var_mean(y, axes, correction=0)
        update_running(bn, mean.detach(), var.detach(), y.numel() // y.shape[1], self.frozen)
        return mean, (var + bn.eps).sqrt()


class _Tailed(_BatchNorm):
    """A batch norm that may have children which run behind it (timm's BatchNormAct2d: an activation)."""

    _tail: tuple[nn.Module, ...]  # in a tuple: they are registered already

    def _behind(self, y: Tensor) -> Tensor:
        for child in self._tail:
            y = child(y)
        return y


class _PassedOver(_Tailed):
    """The batch norm of a two-conv fold: its work is done in the conv; it keeps its parameters and statistics."""

    prefix = "PassedOver"

    def forward(self, x: Tensor) -> Tensor:
        return self._behind(x)


class _QuantizedOutput(nn.Module):
    """A live module whose output is quantized, because an add or concat reads it."""

    prefix = "OutputQuantized"
    output_quantizer: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output_quantizer(super().forward(*args, **kwargs))


class _Freezable(_Tailed):
    """A batch norm that uses its running statistics once `frozen` (bool [1]) is set, without recompiling."""

    prefix = "Freezable"
    frozen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        used_mean = torch.where(self.frozen, running_mean(self), mean)
        used_sigma = torch.where(self.frozen, running_sigma(self), (var + self.eps).sqrt())
        update_running(self, mean.detach(), var.detach(), x.numel() // x.shape[1], self.frozen)
        gamma, beta = affine(self)
        slope = gamma / used_sigma
        y = wide * per_channel(slope, wide) + per_channel(beta - used_mean * slope, wide)
        return self._behind(y.to(x.dtype))


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """`[O]` as a factor of `y [B, O, ...]`, in y's dtype."""
    return values.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


def scaled_rows(weight: Tensor, f: Tensor) -> Tensor:
    """`weight [O, ...] * f [O]`."""
    return weight * f.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


def running_sigma(bn: _BatchNorm) -> Tensor:
    assert bn.running_var is not None
    return (bn.running_var.float() + bn.eps).sqrt()


def running_mean(bn: _BatchNorm) -> Tensor:
    assert bn.running_mean is not None
    return bn.running_mean.float()


def affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(gamma, beta) `[O]` fp32; ones and zeros if the batch norm has none."""
    ones = torch.ones_like(running_mean(bn))
    return (ones if bn.weight is None else bn.weight.float(), 0 * ones if bn.bias is None else bn.bias.float())


@torch.no_grad()
def update_running(bn: _BatchNorm, mean: Tensor, var: Tensor, n: int, frozen: Tensor) -> None:
    """What a batch norm does to its running statistics after a batch: mean and (biased) var `[O]`, of n values each."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    moving = (~frozen).float()
    bn.num_batches_tracked.add_((~frozen).long().view(()))
    average: Tensor = 1.0 / bn.num_batches_tracked.float().clamp(min=1)
    momentum = average if bn.momentum is None else bn.momentum
    bn.running_mean.add_((mean - bn.running_mean.float()) * momentum * moving)
    bn.running_var.add_((var * (n / max(n - 1, 1)) - bn.running_var.float()) * momentum * moving)


def swapped_class(mixin: type[nn.Module], base: type[nn.Module]) -> Any:
    """The class of a live layer of class `base` with `mixin` in front, the same one each time."""
    return _swapped_class(cast(Hashable, mixin), cast(Hashable, base))


@cache
def _swapped_class(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.prefix}{base.__name__}", (mixin, base), {"__module__": __name__})


def swap(
    layer: Any,
    weight: WeightQuantizer,
    input: ActivationQuantizer | None,
    output: ActivationQuantizer | None,
    bn: _BatchNorm | None = None,
    fold: str = "none",
    freezable: bool = False,
    tail: tuple[nn.Module, ...] = (),
) -> None:
    """Turns a live Linear or Conv into its fake-quantized class, and its batch norm into what the fold mode needs.

    tail: the children of the batch norm that run behind it.
    """
    mixin: type[nn.Module] = _FakeQuantLinear if isinstance(layer, nn.Linear) else _FakeQuantConv
    if bn is not None and fold != "none":
        mixin = _OneConvFolded if fold == "one_conv" else _TwoConvFolded
        layer.register_buffer("sigma", running_sigma(bn).detach())
        layer._bn = (bn,)
    layer.__class__ = swapped_class(mixin, type(layer))
    layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer = weight, input, output
    if bn is None or (fold != "two_conv" and not freezable):
        return
    holder = layer if fold == "two_conv" else bn
    holder.register_buffer("frozen", torch.zeros(1, dtype=torch.bool, device=running_mean(bn).device))
    bn.__class__ = swapped_class(_PassedOver if fold == "two_conv" else _Freezable, type(bn))
    bn._tail = tail  # type: ignore[assignment]


def give_output_quantizer(module: Any, quantizer: ActivationQuantizer) -> None:
    """Makes a live module quantize its output, whatever it is."""
    if not isinstance(module, FakeQuantized):
        module.__class__ = swapped_class(_QuantizedOutput, type(module))
    module.output_quantizer = quantizer


def quantizes_output(module: nn.Module) -> bool:
    """Whether a live module's own forward is unchanged but for what `give_output_quantizer` made of it."""
    return isinstance(module, _QuantizedOutput)
