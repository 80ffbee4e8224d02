"""Scores units: each output channel of the layers that make a unit gets a score, averaged over the unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gs_algos.core.modules import get_module
from gs_algos.pruning.channel_groups.groups import FIXED, GroupLayer, Groups, tensors_by_name

# (live model, layer of a group) -> [size] fp32, or None if this layer has nothing to say
Importance = Callable[[nn.Module, GroupLayer], "Tensor | None"]


def unit_scores(model: nn.Module, groups: Groups, importance: Importance) -> Tensor:
    """Averages the scores of each unit's channels over all layers that have any, `[groups.n]` fp32; NaN without."""
    total, count = torch.zeros(groups.n), torch.zeros(groups.n)
    for group in groups.prunable():
        for layer in group.layers:
            importances = importance(model, layer)
            if importances is None:
                continue
            scores = importances.detach().float().cpu()
            own = layer.units != FIXED
            total.index_add_(0, layer.units[own], scores[own])
            count.index_add_(0, layer.units[own], torch.ones(int(own.sum())))
    return total / torch.where(count > 0, count, torch.nan)


def l1(model: nn.Module, layer: GroupLayer) -> Tensor:
    """Scores by the sum of |w| of an output channel, relative to the layer's mean. Li et al. 2017, arXiv:1608.08710."""
    return _relative(_rows(model, layer).abs().sum(1))


def l2(model: nn.Module, layer: GroupLayer) -> Tensor:
    """Scores by the Euclidean norm of each output channel, relative to the layer's mean."""
    return _relative(_rows(model, layer).norm(dim=1))


def bn_scale(model: nn.Module, layer: GroupLayer) -> Tensor | None:
    """Scores by |gamma| of the batch norm behind the layer, relative to its mean. Liu et al. 2017, arXiv:1708.06519."""
    gamma = gamma_of(model, layer)
    return None if gamma is None else _relative(gamma.abs())


def scaled_norm(model: nn.Module, layer: GroupLayer) -> Tensor:
    """Scores by `||w|| |gamma|`: the norm of each output channel times the scale of a batch norm behind it."""
    norm, gamma = _rows(model, layer).norm(dim=1), gamma_of(model, layer)
    return _relative(norm if gamma is None else norm * gamma.abs())


def random_scores(seed: int) -> Importance:
    """Scores at random: the control of every comparison."""
    generator = torch.Generator().manual_seed(seed)
    return lambda model, layer: torch.rand(len(layer.units), generator=generator)


def gamma_of(model: nn.Module, layer: GroupLayer) -> Tensor | None:
    """Returns the scale of the batch norm that normalizes just this layer's channels; None if there is none."""
    if layer.norm is None:
        return None
    weight = get_module(model, layer.norm)._parameters.get("weight")
    return None if weight is None else weight.detach().float()


def output_scale(model: nn.Module, layer: GroupLayer) -> Tensor:
    """Measures how large each output channel is: |gamma| behind a batch norm, else the norm of its weights; mean 1."""
    gamma = gamma_of(model, layer)
    return l2(model, layer) if gamma is None else _relative(gamma.abs())


def _rows(model: nn.Module, layer: GroupLayer) -> Tensor:
    return tensors_by_name(model)[layer.tensor].detach().float().movedim(layer.dim, 0).flatten(1)


def _relative(scores: Tensor) -> Tensor:
    return scores / scores.mean().clamp(min=torch.finfo(torch.float32).tiny)
