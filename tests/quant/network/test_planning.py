"""SimQAT and SLB plan alike: functional layers, adds with one scale, and a row with the reason for what stays float."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.core.algorithm import history
from gs_algos.quant.network.layer_plan import JoinPlan, LayerPlan
from tests.nets.convolutional import SmallConvNet, images, train


class Calls(nn.Module):
    """Functional layers, an add of two modules, one with a function, and layers that stay float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3) / 3)
        self.matrix = nn.Parameter(torch.randn(4, 4) / 2)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 1)
        self.up, self.idle = nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        x = self.left(x) + self.right(x)
        x = self.third(x) + F.relu(x)
        x = self.up(x).mean((2, 3))
        return x @ self.matrix


ADD = "add of left, right"
ALGORITHMS: dict[str, Any] = {
    "simqat": lambda **options: SimQAT(**{"weight": "int4@channel", "act": "int8@tensor:ema", **options}),
    "slb": lambda **options: SLB(**{"weight": "4bit@channel", "act": "int8@tensor:ema", "total_steps": 8, **options}),
}


def test_both_act_on_the_same_layers_and_give_the_same_reasons_for_the_others():
    plans = [make().plan(Calls(), images()) for make in ALGORITHMS.values()]
    rows = [[(row.site, row.kind, row.action == "keep", row.reason) for row in plan.rows] for plan in plans]
    assert rows[0] == rows[1]
    assert {row.site for row in plans[0].acted()} == {"left", "right", "third", "kernel_conv2d", "matrix_matmul", ADD}
    assert {row.site: row.reason for row in plans[1].kept()} == {
        "idle": "did not run on the example inputs in eval mode",
        "up": "ConvTranspose2d is not supported yet",
        "add of third, a function": "an operand comes from a function: no module to quantize it in",
    }


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_layers_and_joins_are_typed_and_say_the_same_facts(make):
    rows = {row.site: row.settings for row in make().plan(SmallConvNet(), images()).acted()}
    assert rows["block.conv1"] == LayerPlan(**{**vars(rows["block.conv1"]), "bn": "block.bn1", "shape": (8, 6, 3, 3)})
    assert rows["block.conv1"].consumers == ("block.conv2",)
    join = rows["add of block.bn2, block.project.1"]
    assert isinstance(join, JoinPlan) and join.operands == ("block.bn2", "block.project.1")


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_rule_on_a_layer_gives_the_add_behind_its_batch_norm_another_scheme(make):
    algo = make(act="int4@tensor", rules=[("block.conv2", {"join": "int8@tensor"})])
    net = algo.apply(SmallConvNet(), images())
    shared = net.block.project[1].output_quantizer
    assert shared is net.block.bn2.output_quantizer and shared.scheme.bits == 8
    assert net.block.conv2.input_quantizer.scheme.bits == 4


def test_of_the_layers_of_an_add_the_rule_with_most_bits_counts():
    rules = [("block.conv2", {"join": "int4@tensor"}), ("block.project.0", {"join": "int6@tensor:mse"})]
    plan = SimQAT(act=None, rules=rules).plan(SmallConvNet(), images())
    assert {row.site: row.settings for row in plan.acted()}["add of block.bn2, block.project.1"].act.startswith("int6")


def test_a_rule_for_ptq_names_the_layer_whose_batch_norm_is_folded():
    algo = gs_algos.PTQ(weight="int8@channel", act="int4@tensor", rules=[("block.conv2", {"join": "int8@tensor"})])
    net = algo.apply(SmallConvNet().eval(), images())
    assert net.block.conv2.output_quantizer.scheme.bits == 8


@pytest.mark.parametrize(
    ("join", "site", "words"),
    [
        ("int8@tensor", "fc", "must match a layer in front of an add or a concat with one scale, got"),
        ("int8@channel", "block.conv2", "rule block.conv2: .*channel"),
    ],
)
def test_a_join_that_no_add_has_and_one_that_is_no_scheme_are_refused(join, site, words):
    with pytest.raises(ValueError, match=words):
        SimQAT(rules=[(site, {"join": join})]).plan(SmallConvNet(), images())


@pytest.mark.parametrize("rules", [(), [("block.conv2", {"act": None})]], ids=["all", "one reads floats"])
@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_operands_of_an_add_share_one_scale_in_training_and_once_converted(make, rules, tmp_path):
    algo = make(rules=rules)
    net = algo.apply(SmallConvNet(), images())
    shared = net.block.bn2.output_quantizer
    assert net.block.project[1].output_quantizer is shared and shared.scheme.bits == 8
    if isinstance(algo, SLB):
        train(net, algo, steps=6, optimizer=torch.optim.SGD(net.parameters(), lr=0.05))
    else:
        train(net, algo)
    assert shared.steps > 0  # its range has followed the training
    x = images(seed=1)
    with torch.no_grad():
        want = net.eval()(x)
        net = algo.convert(net)
        assert torch.equal(net.eval()(x), want)
        grids = [net.block.conv2.output_quantizer, net.block.project[0].output_quantizer]
        assert grids[0].same_grid(grids[1])
        loaded = gs_algos.load(gs_algos.save(net, tmp_path), SmallConvNet)
        assert torch.equal(loaded.eval()(x), want)
    assert history(loaded) == json.loads(json.dumps(history(net)))


@pytest.mark.parametrize(
    "make, options, reason",
    [
        (ALGORITHMS["simqat"], {"act": None}, "activations are not quantized"),
        (ALGORITHMS["slb"], {"act": None}, "activations are not quantized"),
        (ALGORITHMS["slb"], {"act": "uint4@tensor:pact"}, "belongs to one layer's input"),
        (ALGORITHMS["slb"], {"rules": [("block", None)]}, "no operand comes from a quantized layer"),
    ],
)
def test_an_add_that_keeps_its_operands_is_a_row_with_the_reason(make, options, reason):
    rows = {row.site: row for row in make(**options).plan(SmallConvNet(), images()).kept()}
    assert reason in rows["add of block.bn2, block.project.1"].reason


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_rule_that_matches_nothing_is_refused_by_the_class_that_was_called(make):
    algo = make(rules=[("steem", None)])
    with pytest.raises(ValueError, match=rf"^{type(algo).__name__}: every rule must match a layer, got steem"):
        algo.plan(SmallConvNet(), images())
