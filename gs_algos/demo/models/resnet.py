"""Builds residual networks (He et al. 2016, arXiv:1512.03385): the CIFAR family (20, 56, ...) and ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """`relu(x' + bn2(conv2(relu(bn1(conv1(x))))))`, where x' is x or its strided 1x1 projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`: a stem, one stage of blocks per width (the first keeps H, W), a mean.

    Args:
        blocks: residual blocks of each stage, e.g. (3, 3, 3).
        widths: channels of each stage, e.g. (16, 32, 64).
        small_stem: 3x3 stride 1 (images up to 64 pixels) instead of 7x7 stride 2 and a pool.
    """

    def __init__(
        self, in_channels: int, num_classes: int, blocks: Sequence[int], widths: Sequence[int], small_stem: bool
    ) -> None:
        super().__init__()
        if small_stem:
            conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        else:
            conv = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(c_in, c_out, 1 if i == 0 else 2), *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1))
                )
                for i, (n, (c_in, c_out)) in enumerate(zip(blocks, pairwise((widths[0], *widths)), strict=True))
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages(self.stem(x))
        return self.fc(self.pool(y).flatten(1))


def resnet_cifar(depth: int, in_channels: int, num_classes: int) -> ResNet:
    """Builds a network of the CIFAR family of the paper's section 4.2: `depth = 6n + 2`, widths 16/32/64.

    Differs from the paper: a projection shortcut (option B) where the width changes.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"resnet_cifar: depth must be 6n + 2 with n >= 1, got {depth}; use 20, 32, 44 or 56")
    return ResNet(in_channels, num_classes, [(depth - 2) // 6] * 3, (16, 32, 64), small_stem=True)


def resnet20(in_channels: int, num_classes: int, image_size: int) -> ResNet:
    """Builds ResNet-20: 0.27 M parameters; any image size, the stem keeps the resolution."""
    return resnet_cifar(20, in_channels, num_classes)


def resnet56(in_channels: int, num_classes: int, image_size: int) -> ResNet:
    """Builds ResNet-56: 0.86 M parameters; any image size, the stem keeps the resolution."""
    return resnet_cifar(56, in_channels, num_classes)


def resnet18(in_channels: int, num_classes: int, image_size: int) -> ResNet:
    """Builds ResNet-18: 11.2 M parameters, widths 64..512; a 3x3 stem up to 64 pixels, ImageNet's above."""
    return ResNet(in_channels, num_classes, (2, 2, 2, 2), (64, 128, 256, 512), small_stem=image_size <= 64)
