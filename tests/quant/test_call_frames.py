"""How many Python frames of ours lie between a user's call and the arithmetic: what small layers feel most.

Bounds, not figures: a call that gets cheaper stays right. They hold where C++ compiles.
"""

import pytest
import torch
from torch import nn

from gs_algos import PackedLinear, SimQAT, quantize_weights
from gs_kernels import pack_weight, qconv2d, qmatmul, qmatmul_int8
from gs_kernels.qconv2d.cpu import int8_kernel
from gs_kernels.qmatmul.cpu import interleaved_product
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import frames

if INTERPRET or interleaved_product.kernels() is None or int8_kernel.kernels() is None:
    pytest.skip("the CPU's own way is not taken here: interpreted, or no C++ compiler", allow_module_level=True)


def normal(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def weight(n, k):
    return pack_weight(torch.ones(n, k, dtype=torch.uint8), torch.ones(n, 1), bits=4)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int4@channel", "int4@group:8:asym", "int8@channel"])
def test_a_small_packed_linear_is_at_most_6_frames_deep_and_12_calls(scheme):
    layer, x = PackedLinear.from_linear(nn.Linear(16, 16), scheme), normal(2, 16)
    deepest, calls = frames(lambda: layer(x))
    assert deepest <= 6 and calls <= 12


def test_ops_with_a_packed_weight_check_it_once():
    w, filters, x, image = weight(16, 16), weight(8, 72), normal(2, 16), normal(1, 8, 6, 6)
    codes, one = x.to(torch.int8), torch.ones(1)
    calls = {
        "qmatmul": (lambda: qmatmul(x, w), 6, 32),
        "qmatmul_int8": (lambda: qmatmul_int8(codes, one, w), 7, 38),  # one more, to what layers keep prepared
        "qconv2d": (lambda: qconv2d(image, filters, kernel_size=3, padding=1, keep_dense=True), 6, 48),
    }
    for name, (call, deep, many) in calls.items():
        deepest, count = frames(call)
        assert deepest <= deep and count <= many, (name, deepest, count)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@torch.no_grad()
def test_a_small_packed_convolution_is_at_most_6_frames_deep_and_24_calls():
    (layer,), x = quantize_weights(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), "int4@channel"), normal(1, 8, 6, 6)
    deepest, calls = frames(lambda: layer(x))
    assert deepest <= 6 and calls <= 24


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.relu(self.second(torch.relu(y)) + y))


def converted(net, x, **options):
    algo = SimQAT(**options)
    net = algo.apply(net, x)
    net.train()(x)
    return algo.convert(net.eval(), x).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "net, size, options, deep, many",
    [
        (Net, (2, 3, 8, 8), {}, 6, 24),
        (Net, (2, 3, 8, 8), {"act": None}, 7, 34),
        (Residual, (2, 8, 8, 8), {}, 8, 64),
    ],
    ids=["conv, ReLU and linear", "weights alone", "residual block"],
)
def test_what_converted_networks_run_is_at_most_so_many_frames(net, size, options, deep, many):
    x = normal(*size)
    net = converted(net(), x, **options)
    deepest, calls = frames(lambda: net(x))
    assert deepest <= deep and calls <= many
