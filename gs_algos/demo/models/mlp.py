"""Builds a perceptron with two hidden layers: linear layers alone, at a size that trains in seconds."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`: 512 and 256 hidden features, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size * image_size, 512, bias=False),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
        )
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
