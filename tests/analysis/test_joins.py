"""What the one scale of an add or a concat costs, and advice to give it more bits."""

from __future__ import annotations

import ast
import copy
import math

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import PTQ, SLB, SimQAT
from gs_algos.analysis.compare import compare
from gs_kernels import choose_qparams, fake_quant

ALGORITHMS = {
    "simqat": lambda **options: SimQAT(weight="int8@channel", act="int4@tensor", **options),
    "ptq": lambda **options: PTQ(weight="int8@channel", act="int4@tensor", rounding="nearest", **options),
    "slb": lambda **options: SLB(weight="8bit@channel", act="int4@tensor", total_steps=4, **options),
}


class Block(nn.Module):
    """Adds a little to a stream of values that is much larger."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.start = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        x = self.blocks(self.start(self.stem(x)))
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for block in net.blocks:
            block.norm.running_var.uniform_(1, 3)
            block.norm.weight.fill_(0.3)
        net.fc.weight.mul_(10)
    return net.eval()


def batches():
    return list(torch.randn(6, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def compressed(algo, net):
    new = algo.apply(copy.deepcopy(net), batches()[0])
    algo.calibrate(new, batches())
    return algo.convert(new.eval(), batches()[0])


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_adds_and_concats_are_compared_and_name_the_layer_that_rules_name(net, make):
    joins = compare(net, compressed(make(), net), batches()).joins
    assert [one.layer for one in joins] == ["blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "left"]
    assert all(one.act.startswith("int4@tensor") and 3 < one.sqnr < 35 for one in joins)


def test_the_error_of_an_add_is_what_rounding_its_operands_makes(net):
    found = compare(net, compressed(ALGORITHMS["simqat"](), net), batches())
    low, high = (torch.tensor([end]) for end in found.joins[0].grid_range)
    with torch.no_grad():
        start = net.start(net.stem(torch.cat(batches())))
        operands = torch.cat([start, net.blocks[0].norm(net.blocks[0].conv(start))])
        scale, zero = choose_qparams(low, high, qmin=-8, qmax=7, symmetric=False)
        error = fake_quant(operands, scale, zero, qmin=-8, qmax=7) - operands
    want = 10 * math.log10(float(operands.double().square().sum() / error.double().square().sum()))
    assert found.joins[0].sqnr == pytest.approx(want, abs=1e-2) and found.joins[0].site in str(found)


@pytest.mark.parametrize("kind", ["simqat", "ptq"])
def test_more_bits_for_adds_are_advised_and_the_rules_give_what_was_predicted(net, kind):
    make = ALGORITHMS[kind]
    found = gs_algos.report(net, compressed(make(), net), batches(), seconds=0.0, tolerance=9)
    advice = next(one for one in found.advice if "'join'" in one.rules)
    assert advice.text == "Give the operands of every add or concat 8 bits"
    again = compressed(make(rules=ast.literal_eval(advice.rules.removeprefix("rules="))), net)
    assert {one.act[:11] for one in compare(net, again, batches()).joins} == {"int8@tensor"}
    x = torch.cat(batches()[3:])  # the samples that verify
    with torch.no_grad():
        p, q = net(x).log_softmax(-1), again(x).log_softmax(-1)
    assert advice.measured.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.1)


def test_adds_of_8_bits_need_no_advice(net):
    new = compressed(SimQAT(weight="int8@channel", act="int8@tensor"), net)
    assert not any("join" in one.rules for one in gs_algos.report(net, new, batches(), seconds=0.0).advice)


def test_the_page_has_a_table_of_adds(net):
    page = gs_algos.report(net, compressed(ALGORITHMS["simqat"](), net), batches(), seconds=0.0).html()
    assert "One scale for operands: table of 4 adds and concats" in page
