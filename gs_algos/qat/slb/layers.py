"""Defines layers whose weight is being searched: the class of a `nn.Linear` or `nn.Conv*d` is swapped in place.

A swapped layer has a child `search` (search.py) in place of its parameter `weight`, and may have the children
`input_quantizer` and `output_quantizer`. With a fused optimizer it keeps the parameter `weight` as well: the mixture,
written after each step; its gradient is what the optimizer reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.core.modules import swapped_class
from gs_algos.qat.slb.search import LevelSearch, local, rows_of
from gs_algos.quant.fake_quant.batch_norm import CoupledBatchNorm, PrecomputedBatchNorm, swap_norm, update_running
from gs_algos.quant.fake_quant.integer_inference import IntegerEval, centered_codes
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.packed.module import autocast_dtype
from gs_kernels.runtime.torch_private import _BatchNorm


class SearchedLayer(IntegerEval):
    """Computes with the searched weight; mixed in front of the layer's own class."""

    prefix = "Searched"
    search: LevelSearch
    _conv_forward: Callable[..., Tensor]
    _has_state_norm: bool = False  # whether a state batch norm is behind

    @property
    def weight(self) -> Tensor:
        """Returns the weight as the forward uses it now: quantized in eval mode and once the codes are chosen."""
        mixture = self._parameters.get("weight")
        if mixture is not None and (self.training or self.search.one_hot):
            return mixture
        return self.search(quantized=not self.training)

    @property
    def fused(self) -> bool:
        return self._parameters.get("weight") is not None

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the mixture, or the chosen values, into the parameter that a fused optimizer's layer keeps."""
        mixture = self._parameters.get("weight")
        if mixture is None:
            return
        rows = local(mixture)  # under FSDP2 the same rows of logits and weight lie on a rank
        if rows.numel():
            rows.copy_(rows_of(self.search(), mixture) if self.search.one_hot else self.search.local_mixture())

    def mixed(self, x: Tensor) -> Tensor:
        """Returns the weight for this input, in the dtype and memory format that the product wants."""
        mixture = self._parameters.get("weight")
        if mixture is not None and self.search.one_hot:
            return mixture.detach()
        if mixture is not None and self.training:
            return mixture
        return self.search(product_dtype(x), weight_format(x), not self.training)

    def idle(self) -> bool:
        """Returns whether the trained parameter takes no part in the product, though DDP waits for its gradient."""
        return self.search.one_hot and self.training and torch.is_grad_enabled()

    def weight_scheme(self) -> LevelGrid:
        return self.search.grid

    def centered_weight(self) -> tuple[Tensor, Tensor] | None:
        if hasattr(self.search.logits, "full_tensor"):
            return None
        weight = self.search(quantized=True)
        scale = weight.new_full((weight.shape[0],), self.search.grid.step)
        scale = scale if self.search.scale is None else scale * self.search.scale.detach()
        return centered_codes(weight, scale.view(-1, *[1] * (weight.dim() - 1))), scale

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_output(self.evaluated(input, self.on_floats))

    def on_floats(self, x: Tensor) -> Tensor:
        """Computes the layer's output in floats, with the mixed or the chosen weight."""
        x = self.quantized_input(x)
        late = not x.requires_grad
        parameter = self._parameters.get("weight") if self.fused else self.search.logits
        if self.idle() and not late:
            x = _KeepInGraph.apply(x, parameter)
        y = self.product(x, self.mixed(x), self.bias)
        if self._has_state_norm and self.training and not self.search.one_hot:
            self._update_state_norm(x)
        if not (self.idle() and late):
            return y
        return _KeepInGraph.apply(y, parameter).clone()  # a view could not be changed in place, as a ReLU behind does

    @torch.no_grad()
    def _update_state_norm(self, x: Tensor) -> None:
        """Updates running statistics of the batch norm behind with those of the product with the quantized weight."""
        y = self.product(x, self.search(product_dtype(x), weight_format(x), True), self.bias).float()
        if y.numel() == 0:
            return
        bn = self._bn[0]
        axes = [0, *range(2, y.dim())]
        var, mean = torch.var_mean(y, axes, correction=0)
        never = torch.zeros(1, dtype=torch.bool, device=y.device)
        update_running(bn, mean, var, y.numel() // y.shape[1], never)


class _SearchedLinear(SearchedLayer):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class _SearchedConv(SearchedLayer):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class _StateNorm(CoupledBatchNorm):
    """Normalizes by state batch norm (Yang et al. 2020, arXiv:2009.08695, section 3.3).

    Training normalizes what the mixture gives; the running statistics, which inference reads, are those of the
    quantized weight; gamma and beta are shared.

    Differs from the paper: no running statistics of the mixture are kept, since nothing reads them.
    """

    prefix = "State"
    _layer: tuple[SearchedLayer]

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        if not (self.training and layer.training) or layer.search.one_hot:
            return super().forward(x)
        return self._behind(F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps))


class _KeepInGraph(torch.autograd.Function):
    """Returns x with a parameter in its graph that gets no gradient, so that DDP's hooks run and optimizers skip it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a product with x runs in: autocast's, or that of x."""
    return autocast_dtype(x) or x.dtype


def weight_format(x: Tensor) -> torch.memory_format:
    """Returns the memory format in which a convolution of x wants its weight."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def swap(
    layer: Any,
    search: LevelSearch,
    input: ActivationQuantizer | None,
    fused: bool = False,
    bn: _BatchNorm | None = None,
    state: bool = False,
    norm_children: tuple[nn.Module, ...] = (),
) -> None:
    """Turns a live Linear or Conv into one whose weight is searched, and its batch norm into what that needs.

    bn: the batch norm behind; state: it becomes a state batch norm; norm_children: its children that run behind it.
    """
    if not fused:
        del layer._parameters["weight"]
    layer.__class__ = swapped_class(_SearchedLinear if isinstance(layer, nn.Linear) else _SearchedConv, type(layer))
    layer.search, layer.input_quantizer, layer._has_state_norm = search, input, state
    layer.output_quantizer = None  # until an add or a concat shares one
    if bn is None:
        return
    layer._bn = (bn,)
    if state:
        swap_norm(bn, _StateNorm, norm_children)
        bn._layer = (layer,)  # type: ignore[assignment]
    if input is not None:
        swap_norm(bn, PrecomputedBatchNorm, norm_children)
