"""Has the demo's networks: plain nn.Modules, written out by hand so that what an algorithm does to them can be read.

Every builder takes `in_channels`, `num_classes` and `image_size` (height = width, in pixels), and adapts to the size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.demo.imported import import_network, is_imported
from gs_algos.demo.models.ghostnet import GhostNet
from gs_algos.demo.models.lenet5 import LeNet5, LeNet5BN
from gs_algos.demo.models.mlp import MLP
from gs_algos.demo.models.mobilenetv2 import MobileNetV2
from gs_algos.demo.models.resnet import resnet18, resnet20, resnet56
from gs_algos.demo.models.vit import vit_tiny

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "lenet5-bn": LeNet5BN,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "mobilenetv2": MobileNetV2,
    "ghostnet": GhostNet,
    "vit-tiny": vit_tiny,
    "mlp": MLP,
}


def check_name(name: str) -> None:
    """Raises ValueError if a name can be no network's."""
    if name not in MODELS and not is_imported(name):
        near = did_you_mean(name, MODELS)
        raise ValueError(f"model: must be one of {', '.join(MODELS)}, or package.module:function, got {name!r}{near}")


def build(name: str, *, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Builds a freshly initialized network of MODELS, or of `package.module:function`. The caller owns the random seed.

    Raises:
        ValueError: if it is neither, or the images are too small for the network.
    """
    if is_imported(name):
        return import_network(name, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    check_name(name)
    return MODELS[name](in_channels=in_channels, num_classes=num_classes, image_size=image_size)
