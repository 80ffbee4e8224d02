"""Builds LeNet-5 (LeCun et al. 1998), with ReLU, max pooling and padded convolutions so that 8x8 images fit too."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`. Two 5x5 convolutions and three linear layers; H = W = image_size, >= 4.

    Differs from the paper: ReLU for tanh, max for average pooling, padding 2 in both convolutions, a linear classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = image_size // 4
        if side < 1:
            raise ValueError(f"lenet5: image_size must be >= 4, got {image_size}; resize the images")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
