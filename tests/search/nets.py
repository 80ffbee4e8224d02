"""A small network, its data, and searches of it that take a moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gs_algos import SimQAT
from gs_algos.search.policy import Policy
from gs_algos.search.search import search


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, out in ((3, 8), (8, 16), (16, 16), (16, 24)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5)
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 2)
    return model.eval()


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def data() -> list[Tensor]:
    return [images(16, 2), images(16, 3)]


def found(algorithms: Any = None, model: nn.Module | None = None, **options: Any) -> Policy:
    algorithms = SimQAT(act=None) if algorithms is None else algorithms
    return search(net() if model is None else model, images(), algorithms, data(), **options)
