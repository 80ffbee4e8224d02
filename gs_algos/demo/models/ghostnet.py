"""Builds GhostNet (Han et al. 2020, arXiv:1911.11907): inverted residuals whose 1x1 convolutions make ghosts.

Half of the channels of a ghost module are those of a 1x1 convolution, the others depthwise filters of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# kernel, expanded channels, output channels, squeeze and excitation, stride: table 1 of the paper
BLOCKS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class GhostModule(nn.Module):
    """`concat(p, cheap(p))` with p of half of the channels: 1x1 with a batch norm, then 3x3 depthwise with one."""

    def __init__(self, in_channels: int, out_channels: int, activated: bool) -> None:
        super().__init__()
        half = out_channels // 2
        act = [nn.ReLU()] if activated else []
        self.primary = nn.Sequential(*conv_bn(in_channels, half, 1), *act)
        self.cheap = nn.Sequential(*conv_bn(half, half, 3, groups=half), *([nn.ReLU()] if activated else []))

    def forward(self, x: Tensor) -> Tensor:
        p = self.primary(x)
        return torch.cat([p, self.cheap(p)], 1)


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a factor in [0, 1] that depends on the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = (channels // 4 + 2) // 4 * 4  # a quarter, to the nearest multiple of 4
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, inside, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(inside, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class GhostBottleneck(nn.Module):
    """`shortcut(x) + ghost(SE(depthwise(ghost(x))))`: the depthwise convolution only where there is a stride."""

    def __init__(self, in_channels: int, block: tuple[int, int, int, bool, int], stride: int) -> None:
        super().__init__()
        kernel, hidden, out_channels, squeezed, _ = block
        self.expand = GhostModule(in_channels, hidden, activated=True)
        depthwise = conv_bn(hidden, hidden, kernel, stride, hidden) if stride > 1 else []
        self.depthwise = nn.Sequential(*depthwise)
        self.excite = SqueezeExcite(hidden) if squeezed else nn.Identity()
        self.project = GhostModule(hidden, out_channels, activated=False)
        same = stride == 1 and in_channels == out_channels
        shortcut = conv_bn(in_channels, in_channels, kernel, stride, in_channels) + conv_bn(
            in_channels, out_channels, 1
        )
        self.shortcut = nn.Sequential(*([] if same else shortcut))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.excite(self.depthwise(self.expand(x)))) + self.shortcut(x)


class GhostNet(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`, width 1.0: 3.9 M parameters for 10 classes.

    Up to 64 pixels the sides are divided by 8 (stem and first strided block keep the resolution), above by 32.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        small = image_size <= 64
        self.stem = nn.Sequential(*conv_bn(in_channels, 16, 3, 1 if small else 2), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = 16
        for number, block in enumerate(BLOCKS):
            blocks.append(GhostBottleneck(channels, block, 1 if small and number == 1 else block[-1]))
            channels = block[2]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv_bn(channels, 960, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.widen = nn.Sequential(nn.Conv2d(960, 1280, 1), nn.ReLU())
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.head(self.blocks(self.stem(x))))
        return self.fc(self.widen(y).flatten(1))
