"""Activations of a user's own class run as they are behind a converted layer, also where a sum reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SimQAT
from gs_algos.quant.integer.layers import QuantizedConv


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class TanhGELU(nn.Module):
    """One op by its name, and yet another function than nn.GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Raised(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Beta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Renamed(nn.SiLU):
    """Nothing of its own."""


class Block(nn.Module):
    def __init__(self, act: type[nn.Module], join: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.bn, self.a1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act()
        self.c2, self.a2 = nn.Conv2d(8, 8, 3, padding=1), act()
        self.out, self.join = nn.Conv2d(16 if join == "cat" else 8, 4, 1), join

    def forward(self, x: Tensor) -> Tensor:
        y = self.a1(self.bn(self.c1(x)))
        z = self.a2(self.c2(y))
        return self.out(y + z if self.join == "add" else torch.cat([y, z], 1))


def image() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("join", ["add", "cat"])
@pytest.mark.parametrize("act", [Swish, TanhGELU, Overwriting, Raised, Beta, Same, nn.PReLU, Renamed])
def test_a_block_with_such_an_activation_converts_to_what_it_computed(act, join, tmp_path):
    net, algo = Block(act, join), SimQAT()
    algo.apply(net, image())(image()).sum().backward()
    algo.step()
    with torch.no_grad():
        want = net.eval()(image())
        net = algo.convert(net)
        got = net(image())
        again = gs_algos.load(gs_algos.save(net, tmp_path), lambda: Block(act, join)).eval()
        assert sum(isinstance(module, QuantizedConv) for module in net.modules()) == 3
        assert (got - want).norm() < 1e-6 * want.norm() and torch.equal(again(image()), got)


def test_the_class_is_named_where_it_is_not_fused():
    net, algo = Block(Swish, "add"), SimQAT()
    net = algo.convert(algo.apply(net, image()))
    assert net.c1.notes == ("a1 is not fused: Swish has a forward of its own",)
