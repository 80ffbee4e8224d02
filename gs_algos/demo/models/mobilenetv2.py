"""Builds MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): depthwise convolutions between narrow residual ends."""

from __future__ import annotations

from torch import Tensor, nn

# expansion, output channels, blocks, stride of the first block: table 2 of the paper
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn_act(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """`x + project(depthwise(expand(x)))`, the sum only where shape allows; the projection has no activation."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = conv_bn_act(in_channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = conv_bn_act(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """`[B, C, H, W] -> [B, num_classes]`, width 1.0: 2.2 M parameters for 10 classes.

    Up to 64 pixels the sides are divided by 8 (stem and first strided stage keep the resolution), above by 32.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        small = image_size <= 64
        self.stem = conv_bn_act(in_channels, 32, 3, stride=1 if small else 2)
        blocks: list[nn.Module] = []
        channels = 32
        for stage, (expansion, out_channels, count, stride) in enumerate(STAGES):
            for i in range(count):
                keep = i > 0 or (small and stage == 1)
                blocks.append(InvertedResidual(channels, out_channels, expansion, 1 if keep else stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn_act(channels, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.blocks(self.stem(x)))
        return self.fc(self.pool(y).flatten(1))
