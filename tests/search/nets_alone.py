"""The network of these tests, without an import of what searches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, out in ((3, 8), (8, 16), (16, 16), (16, 24)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5)
    model = nn.Sequential(*layers, *ends)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 2)
    return model.eval()


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
