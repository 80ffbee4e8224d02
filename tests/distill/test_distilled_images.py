"""Distilled images have the statistics that a network's batch norms remember, and calibrate it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import PTQ, distilled_images
from gs_algos.distill.distilled_images import distance, noise

SHAPE = (3, 16, 16)
PIXELS = (-1.0, 1.0)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Is a network whose norms have seen smooth images, not noise."""
    torch.manual_seed(0)
    blocks = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for _ in range(40):
        model(torch.nn.functional.interpolate(torch.rand(32, 3, 3, 3) - 0.2, size=16, mode="bilinear"))
    return model.eval()


def seen(net: Any, x: torch.Tensor) -> float:
    """Returns how far the outputs of the convolutions are from what the norms behind them remember."""
    with torch.no_grad():
        first = net[0](x)
        return float(distance(first, net[1]) + distance(net[3](net[2](net[1](first))), net[4])) / 2


def test_norms_see_what_they_remember(net):
    x = distilled_images(net, SHAPE, 8, pixels=PIXELS)
    start = noise((8, *SHAPE), torch.Generator().manual_seed(0)) / 2
    assert x.shape == (8, *SHAPE) and x.dtype == torch.float32 and not x.requires_grad
    assert x.min() >= -1 and x.max() <= 1 and seen(net, x) < 0.05 * seen(net, start.clamp(-1, 1))


def test_images_of_a_seed_are_the_same_and_the_network_stays_as_it_is(net):
    before = {key: t.clone() for key, t in net.state_dict().items()}
    state = torch.get_rng_state()
    x, same, other = (distilled_images(net.train(), SHAPE, 2, pixels=PIXELS, steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(x, same) and not torch.equal(x, other) and torch.equal(state, torch.get_rng_state())
    assert net.training and not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[key], t) for key, t in net.eval().state_dict().items())


def test_the_distance_is_in_standard_deviations():
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.running_mean.fill_(10.0)
    norm.running_var.fill_(4.0)
    x = torch.tensor([13.0, 15.0]).view(2, 1, 1, 1)  # mean 14, deviation 1
    assert distance(x, norm).item() == pytest.approx((14 - 10) ** 2 / 4 + (1 / 2 - 1) ** 2)


def test_ptq_calibrates_on_them(net):
    x = distilled_images(net, SHAPE, 8, pixels=PIXELS, steps=60)
    algo = PTQ(weight="int8@channel", act="int8@tensor")
    want = net(x)
    new = algo.apply(net, x[:1])
    algo.calibrate(new, x.split(2))
    assert (algo.convert(new)(x) - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shape": (16, 16)}, r"shape must be \(C, H, W\) of two or more pixels, got \(16, 16\)"),
        ({"shape": 16}, r"shape must be \(C, H, W\) of two or more pixels, got 16"),
        ({"network": nn.Conv2d(4, 4, 3)}, "the inputs must run through the model, got .*to have 4 channels, but got 3"),
        ({"pixels": 3}, r"pixels must be \(least, largest\), finite, got 3"),
        ({"pixels": ("0", "1")}, r"pixels must be \(least, largest\), finite"),
        ({"lr": "fast"}, "lr must be finite and > 0, got 'fast'"),
        ({"count": 0}, "count must be a whole number >= 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number >= 1, got 2.5"),
        ({"pixels": (1.0, -1.0)}, r"pixels must be \(least, largest\), finite, got \(1.0, -1.0\)"),
        ({"pixels": (float("-inf"), 1.0)}, "pixels must be"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"seed": 2**40}, "seed must be within 32 bits"),
        ({"network": nn.Conv2d(3, 4, 3)}, "must have batch norms with running statistics, got none that reads"),
        ({"network": nn.BatchNorm2d(3, track_running_stats=False)}, "must have batch norms with running statistics"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    arguments: dict[str, Any] = {"network": nn.BatchNorm2d(3), "shape": SHAPE, "pixels": PIXELS, **change}
    with pytest.raises(ValueError, match=words):
        distilled_images(**arguments)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_changes_nothing(mode):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    wanted = distilled_images(net, SHAPE, 2, pixels=PIXELS, steps=2)
    with mode():
        x = distilled_images(net, SHAPE, 2, pixels=PIXELS, steps=2)
    assert torch.equal(x, wanted) and not x.is_inference()


def test_a_distance_that_is_not_finite_is_refused():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the distance must be finite, got nan in step 0"):
        distilled_images(norm, SHAPE, pixels=PIXELS)
