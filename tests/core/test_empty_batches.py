"""A batch without images, rows or tokens: what the float network does with it, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SLB, SimQAT, quantize_weights
from tests.helpers import relative_rms
from tests.nets.convolutional import SmallConvNet, images, mlp

ACTS = ("int8@tensor:ema", "uint8@tensor:minmax", "int8@tensor:percentile", "int8@tensor:mse", "int8@tensor:lsq")
ALGORITHMS: dict[str, Callable[[], Any]] = {
    **{act: lambda act=act: SimQAT(act=act) for act in ACTS},  # type: ignore[misc]
    "two convs": lambda: SimQAT(fold_bn="two_conv"),
    "freezable": lambda: SimQAT(fold_bn=False, freeze_bn=9),
    "apart": lambda: SimQAT(fusion=False, fold_bn=False, weight="int8@channel:lsq"),
    "weights alone": lambda: SimQAT(act=None),
    "searched": lambda: SLB(weight="2bit@channel", total_steps=9, batch_norm="state"),
    "searched, pact": lambda: SLB(weight="4bit@channel", act="uint8@tensor:pact", total_steps=9),
}


class Branches(nn.Module):
    """Codes through an add, a concat and pools; a Conv1d behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 3, stride=2)
        self.rows, self.bn = nn.Conv1d(4, 3, 3, padding=1), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x) + self.b(x)), 2)
        x = self.d(torch.cat([x, self.c(x)], 1))
        return self.bn(self.rows(F.avg_pool2d(x, (2, 1)).flatten(2)))


def step(net: nn.Module, algo: Any, x: Tensor) -> None:
    net.train()(x).square().sum().backward()
    algo.step()


@pytest.mark.parametrize("build", [SmallConvNet, Branches])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_network_trains_infers_and_converts_beside_empty_batches(algorithm: str, build: Callable[[], nn.Module]):
    torch.manual_seed(0)
    shape = build().eval()(images()[:0]).shape
    algo = ALGORITHMS[algorithm]()
    net = algo.apply(build(), images())
    step(net, algo, images())
    counted = (".steps", ".num_batches_tracked", ".temperature", ".trace", ".codes")
    before = {name: t.clone() for name, t in net.state_dict().items() if not f".{name}".endswith(counted)}
    net.zero_grad()
    step(net, algo, images()[:0])
    after = net.state_dict()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == []
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    net.eval()
    assert net(images()[:0]).shape == shape
    with torch.no_grad():
        want = net(images())
        assert net(images()[:0]).shape == shape
    algo.convert(net)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            y = net(images()[:0])
            assert type(y) is Tensor and y.shape == shape
    assert relative_rms(net(images()), want) < 1e-3


@pytest.mark.parametrize("algorithm", ["int8@tensor:ema", "weights alone", "searched, pact"])
@pytest.mark.parametrize("size", [(0, 16), (2, 0, 16)])
def test_linear_layers_take_no_rows_and_no_tokens(size: tuple[int, ...], algorithm: str):
    algo = ALGORITHMS[algorithm]()
    net = algo.apply(mlp(), torch.randn(4, 16))
    assert net(torch.zeros(size)).shape == (*size[:-1], 4)
    net = algo.convert(net.eval())
    assert net(torch.zeros(size)).shape == (*size[:-1], 4)


def test_a_part_that_one_batch_leaves_empty_is_calibrated_by_the_others():
    class Boxes(nn.Module):
        """A head that sees what the first layer likes."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = self.first(x)
            return self.head(found[x[:, 0] > 0])

    torch.manual_seed(0)
    some, none = torch.randn(6, 3).abs(), -torch.randn(6, 3).abs()
    algo = SimQAT(act="int8@tensor:mse")
    net = algo.apply(Boxes(), some)
    with pytest.raises(ValueError, match=r"head.input_quantizer sees must hold at least one element, got shape \(0, 3"):
        algo.calibrate(net, batches=[none, none])
    before = net.head.input_quantizer.scale.clone()
    algo.calibrate(net, batches=[none, 2 * some])
    assert not torch.equal(net.head.input_quantizer.scale, before)
    net = algo.convert(net)
    assert net(none).shape == (0, 2)


def test_packed_layers_take_nothing():
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))
    quantize_weights(net, "int4@group:16")
    assert net(torch.zeros(0, dtype=torch.long)).shape == (0, 4)
    assert net(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 4)
    for conv, size in (
        (nn.Conv1d(4, 3, 3), (0, 4, 5)),
        (nn.Conv2d(4, 3, 3), (0, 4, 5, 5)),
        (nn.Conv3d(4, 3, 3), (0, 4) + (5,) * 3),
    ):
        want = conv(torch.zeros(size)).shape
        packed = quantize_weights(nn.Sequential(conv), "int8@channel")
        assert packed(torch.zeros(size)).shape == want
