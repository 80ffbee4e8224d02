"""The demo's networks: shapes at every image size, published parameter counts, plans that leave no layer unsaid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gs_algos import SimQAT
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.models.resnet import resnet_cifar


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_every_network_classifies_images_of_every_data_set(name, channels, size):
    net = build(name, in_channels=channels, num_classes=7, image_size=size).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "ghostnet", "vit-tiny"])
def test_large_images_take_the_imagenet_stem(name):
    net = build(name, in_channels=3, num_classes=10, image_size=96).eval()
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    assert first.stride[0] in (2, 16)
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "classes", "size", "count"),
    [
        ("resnet18", 1000, 224, 11_689_512),  # as torchvision's
        ("mobilenetv2", 1000, 224, 3_504_872),  # as torchvision's
        ("ghostnet", 1000, 224, 5_182_508),  # 5.2 M in the paper
        ("vit-tiny", 1000, 224, 5_717_416 - 2 * 192),  # DeiT-tiny without its class token
        ("resnet20", 10, 32, 272_474),
    ],
)
def test_the_parameter_count_is_the_published_one(name, classes, size, count):
    with torch.device("meta"):
        assert parameters(build(name, in_channels=3, num_classes=classes, image_size=size)) == count


def test_the_seed_decides_the_weights():
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(build("resnet20", in_channels=1, num_classes=10, image_size=8))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_simqat_plans_every_conv_and_linear(name):
    net = build(name, in_channels=1, num_classes=10, image_size=8)
    plan = SimQAT().plan(net, torch.zeros(2, 1, 8, 8))
    layers = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers == {row.site for row in plan.acted() if row.kind in ("Conv2d", "Linear")}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("resnet19", in_channels=1, num_classes=2, image_size=8), "one of lenet5, .*'resnet19'"),
        (lambda: build("lenet5", in_channels=1, num_classes=2, image_size=3), "image_size must be >= 4, got 3"),
        (lambda: build("vit-tiny", in_channels=1, num_classes=2, image_size=30), "multiple of 4, got 30"),
        (lambda: resnet_cifar(21, 1, 2), r"depth must be 6n \+ 2 .* got 21"),
    ],
)
def test_a_network_that_cannot_be_built_says_why(call, words):
    with pytest.raises(ValueError, match=words):
        call()
