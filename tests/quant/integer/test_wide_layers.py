"""Filters and rows so wide that int32 does not hold their sums: they convert, and give what the trained layer gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.quant.integer.layers import QuantizedConv, split_rows
from gs_kernels import pack_weight, qconv2d_int8
from gs_kernels.qconv2d.checks import LARGEST_GROUP
from tests.helpers import relative_rms, same_bits

# K: 16,384 is the widest that is summed at once; 16,411 is a prime; 65,793 products of 255 and 128 pass 2**31
WIDE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "at the bound": (lambda: nn.Conv2d(1024, 3, 4), (2, 1024, 4, 4)),
    "classifier": (lambda: nn.Conv2d(512, 4, 7), (2, 512, 7, 7)),
    "grouped": (lambda: nn.Conv2d(1024, 4, 6, groups=2), (1, 1024, 6, 6)),
    "prime": (lambda: nn.Conv2d(16411, 3, 1), (1, 16411, 2, 2)),
    "depthwise": (lambda: nn.Conv2d(2, 2, 130, groups=2), (1, 2, 130, 131)),
    "Conv1d": (lambda: nn.Conv1d(4096, 3, 5), (2, 4096, 6)),
    "Conv3d": (lambda: nn.Conv3d(640, 3, 3), (1, 640, 3, 3, 3)),
    "Linear": (lambda: nn.Linear(70000, 3), (2, 70000)),
    "odd Linear": (lambda: nn.Linear(33001, 3), (17, 33001)),
}
ALGORITHMS: dict[str, Any] = {
    "8 bits": lambda: SimQAT(),
    "4 by 8 bits": lambda: SimQAT(weight="int4@channel", act="uint8@tensor:ema"),
    "asymmetric": lambda: SimQAT(weight="int8@channel:asym", act="uint8@tensor:ema"),
    "searched": lambda: SLB(weight="2bit@channel", act="uint8@tensor:ema", total_steps=2),
}


def cases() -> list[Any]:
    every = [(name, "8 bits") for name in WIDE]
    return every + [("classifier", name) for name in ALGORITHMS if name != "8 bits"] + [("prime", "searched")]


@pytest.mark.parametrize("layer, algorithm", cases())
def test_a_wide_layer_converts_and_gives_the_same(layer: str, algorithm: str):
    build, size = WIDE[layer]
    torch.manual_seed(0)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).abs()
    algo = ALGORITHMS[algorithm]()
    net = algo.apply(nn.Sequential(build(), nn.ReLU()), x).eval()
    with torch.no_grad():
        want = net(x)
        got = algo.convert(net)(x)
    assert relative_rms(got, want) < 1e-6


def test_parts_of_a_filter_are_one_sum_that_is_rounded_once():
    generator = torch.Generator().manual_seed(2)
    k = 2 * LARGEST_GROUP
    codes = torch.randint(-128, 128, (3, k), generator=generator, dtype=torch.int8)
    weight = pack_weight(codes, torch.tensor([0.5, 1.0, -0.25]), torch.zeros(3), bits=8, group_size=k)
    x = torch.randint(-128, 128, (2, k, 1, 1), generator=generator, dtype=torch.int8)
    parts = split_rows(weight, LARGEST_GROUP)
    assert parts is not None and parts.group_size == LARGEST_GROUP
    assert parts.scale.untyped_storage().data_ptr() == weight.scale.untyped_storage().data_ptr()
    got = qconv2d_int8(x, torch.ones(1), parts, kernel_size=1)
    sums = (x[:, :, 0, 0].double() @ codes.double().t()).float()
    assert same_bits(got[:, :, 0, 0].contiguous(), sums * weight.scale[:, 0])


def test_what_cannot_be_parted_is_multiplied_as_floats_and_says_so():
    algo, x = SimQAT(), torch.randn(1, 16411, 1, 1)
    net = algo.convert(algo.apply(nn.Sequential(nn.Conv2d(16411, 2, 1)), x).eval())
    assert isinstance(net[0], QuantizedConv)
    assert "no int32 holds the sums of 16,411 products" in algo.summary(net)


def test_a_wide_filter_is_saved_as_it_is(tmp_path: Any):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(512, 2, 7), nn.Flatten(), nn.Linear(2, 2)).eval()

    algo, x = SimQAT(act="uint8@tensor:ema"), torch.randn(1, 512, 7, 7)
    net = algo.convert(algo.apply(build(), x))
    loaded: Any = gs_algos.load(gs_algos.save(net, tmp_path), build).eval()
    assert loaded[0].scale.shape == (2, 1)
    y: Tensor = loaded(x)
    assert same_bits(y, net(x))
