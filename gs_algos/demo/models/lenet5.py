"""Builds LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, padded for 8x8 images; plain and with batch norms."""

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


class LeNet5BN(nn.Module):
    """Computes what `LeNet5` does with a batch norm behind every layer but the last, and convolutions for linears.

    `[B, C, H, W] -> [B, num_classes]`; H = W = image_size, >= 4.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = image_size // 4
        if side < 1:
            raise ValueError(f"lenet5-bn: image_size must be >= 4, got {image_size}; resize the images")
        self.features = nn.Sequential(
            *_conv_bn_act(in_channels, 6, 5, 2),
            nn.MaxPool2d(2),
            *_conv_bn_act(6, 16, 5, 2),
            nn.MaxPool2d(2),
            *_conv_bn_act(16, 120, side, 0),
            *_conv_bn_act(120, 84, 1, 0),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(84, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def _conv_bn_act(in_channels: int, out_channels: int, kernel: int, padding: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()
