"""Folds inference batch norms into the conv or linear in front of them.

`W' = W * gamma / sigma`, `b' = beta + (b - mu) * gamma / sigma`; mu = running_mean, sigma = sqrt(running_var + eps).
Jacob et al. 2018, arXiv:1712.05877, eq. (14).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import get_module, set_module
from gs_algos.fx.capture.capture import capture
from gs_algos.fx.patterns import Refusal, match
from gs_kernels.runtime.torch_private import _BatchNorm, _ConvNd, _ConvTransposeNd

logger = logging.getLogger(__name__)


@torch.no_grad()
def fold_bn(layer: _ConvNd | nn.Linear, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Computes (weight, bias) of one layer that equals `bn(layer(x))` in eval mode, in the layer's dtype.

    Computed in fp32 (fp64 for an fp64 layer). A ConvTranspose has its output channels on axis 1, within each group.

    Raises:
        ValueError: if the batch norm has no running statistics, or another number of channels.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn must have running statistics, got track_running_stats=False")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if bn.num_features != channels:
        raise ValueError(f"fold_bn: bn must have the layer's {channels} output channels, got {bn.num_features}")
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
    slope = torch.rsqrt(var + bn.eps) if bn.weight is None else bn.weight.to(dtype) / torch.sqrt(var + bn.eps)  # [O]
    shift = torch.zeros_like(mean) if bn.bias is None else bn.bias.to(dtype)
    bias = shift - mean * slope if layer.bias is None else shift + (layer.bias.to(dtype) - mean) * slope
    weight = layer.weight.to(dtype)
    if isinstance(layer, _ConvTransposeNd):
        grouped = weight.unflatten(0, (layer.groups, -1))  # [groups, C / groups, O / groups, ...]
        slopes = slope.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * slopes).flatten(0, 1)
    else:
        weight = weight * slope.view(-1, *[1] * (weight.dim() - 1))
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)


def fold_model(model: nn.Module, example_inputs: Any, example_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """Folds every batch norm that can be folded, on the live model, and returns it.

    The layer keeps its weight Parameter (new values); the batch norm becomes an Identity at its name. A batch norm that
    cannot be folded stays as it is, and the reason is logged.

    Raises:
        ValueError: if the model is in training mode, or the example inputs do not run through it.
    """
    if model.training:
        raise ValueError("fold_model: model must be in eval mode, got training mode; call model.eval() first")
    matches, refusals = match(capture(model, example_inputs, example_kwargs), model)
    for refusal in refusals:
        _log(refusal)
    for place in matches:
        layer_name, bn_name = place.roles.get("conv") or place.roles.get("linear"), place.roles.get("bn")
        if layer_name is None or bn_name is None:
            continue
        layer, bn = get_module(model, layer_name), get_module(model, bn_name)
        assert isinstance(layer, (_ConvNd, nn.Linear)) and isinstance(bn, _BatchNorm)
        if bn.training:
            _log(Refusal("fold", bn_name, "is in training mode, while the model is in eval mode"))
            continue
        fold_into(model, layer_name, bn_name, place.norm_children)
    return model


@torch.no_grad()
def fold_into(model: nn.Module, layer_name: str, bn_name: str, norm_children: Sequence[str] = ()) -> None:
    """Folds one batch norm of the live model into the layer in front of it, which gets a bias if it had none."""
    layer: Any = get_module(model, layer_name)
    bn: Any = get_module(model, bn_name)
    weight, bias = fold_bn(layer, bn)
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
    set_module(model, bn_name, after_norm(model, bn_name, norm_children))


def after_norm(model: nn.Module, bn: str, norm_children: Sequence[str]) -> nn.Module:
    """Makes what replaces a folded batch norm: an Identity, or the modules in `Match.norm_children` by their names."""
    if not norm_children:
        return nn.Identity()
    children = ((name.removeprefix(f"{bn}.").replace(".", "_"), get_module(model, name)) for name in norm_children)
    return nn.Sequential(OrderedDict(children))


def _log(refusal: Refusal) -> None:
    logger.info("%s stays: %s", refusal.site or "the root", refusal.reason)
