"""The demo's networks: plain nn.Modules, written out by hand so that what an algorithm does to them can be read.

Every builder takes `in_channels`, `num_classes` and `image_size` (height = width, in pixels), and adapts to the size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gs_algos.cli.models.lenet5 import LeNet5
from gs_algos.cli.models.mlp import MLP
from gs_algos.cli.models.mobilenetv2 import MobileNetV2
from gs_algos.cli.models.resnet import resnet18, resnet20, resnet56
from gs_algos.cli.models.vit import vit_tiny

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "mobilenetv2": MobileNetV2,
    "vit-tiny": vit_tiny,
    "mlp": MLP,
}


def build(name: str, *, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """A freshly initialised network of MODELS. The caller owns the random seed.

    Raises:
        ValueError: if the name is not in MODELS, or the images are too small for the network.
    """
    if name not in MODELS:
        raise ValueError(f"model: must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](in_channels=in_channels, num_classes=num_classes, image_size=image_size)
