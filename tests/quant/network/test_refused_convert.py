"""A convert that is refused leaves the training whole: it can be saved, loaded, resumed and converted afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SLB, Prune, SimQAT
from gs_algos.core.algorithm import Algorithm, history
from gs_algos.core.plan import rows_of
from gs_algos.qat.slb.optim import SlbSGD
from gs_algos.quant.network import convert
from tests.helpers import Untouched


def build() -> nn.Module:
    """An activation behind a convolution, which a converted layer takes over."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def learn(net: nn.Module, algo: Algorithm, steps: int) -> None:
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05)]
    if isinstance(algo, SLB) and algo.fused_layers():
        optimizers = [torch.optim.SGD(algo.parameters(net), lr=0.05), SlbSGD(algo.fused_layers(), lr=0.05)]
        optimizers += [torch.optim.SGD(algo.logits(), lr=0.05)] if algo.logits() else []
    for seed in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net.train()(data(seed)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        algo.step()


def nan(algo: Algorithm, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        algo.convert(net, data() * float("nan"))


def other_layer(algo: Algorithm, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "LAYER_TOLERANCE", {})
    monkeypatch.setattr(convert, "relative_error", lambda a, b: 1.0)
    with pytest.raises(RuntimeError, match="must give the trained output within"):
        algo.convert(net, data())


def other_network(algo: Algorithm, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_output_error", lambda got, want: float("nan"))
    with pytest.raises(RuntimeError, match="the network must give the trained output within"):
        algo.convert(net, data())


def interrupted(algo: Algorithm, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "enable_int8_flow", stop)
    with pytest.raises(KeyboardInterrupt):
        algo.convert(net, data())


ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "simqat": SimQAT,
    "simqat, weights": lambda: SimQAT(weight="int4@channel:mse", act=None),
    "slb": lambda: SLB(weight="2bit@channel", total_steps=4),
    "slb, fused": lambda: SLB(weight="2bit@channel", total_steps=4, fused=True),
    "slb, one fused": lambda: SLB(
        weight="1bit@channel", act="int8@tensor:ema", total_steps=4, rules=[("3", {"fused": True})]
    ),
}
REFUSALS = {"NaN": nan, "a layer": other_layer, "the network": other_network, "interrupt": interrupted}


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_training_goes_on_after_a_refused_convert_and_a_checkpoint(make, refuse, tmp_path, monkeypatch):
    algo = make()
    net = algo.apply(build(), data())
    learn(net, algo, steps=2)
    before = Untouched(net)
    refuse(algo, net, monkeypatch)
    monkeypatch.undo()
    assert before
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), build)
    assert history(loaded) == json.loads(json.dumps(history(net)))
    resumed = type(algo).resume(loaded)
    for each, its in ((net, algo), (loaded, resumed)):
        learn(each, its, steps=2)
        its.convert(each, data())
    again = gs_algos.load(gs_algos.save(loaded, tmp_path), build)
    with torch.no_grad():
        want = net.eval()(data())
        assert torch.equal(loaded.eval()(data()), want) and torch.equal(again.eval()(data()), want)


def test_a_search_on_a_pruned_network_survives_a_refused_convert(tmp_path):
    pruned = Prune(rate=0.4)
    net = pruned.convert(pruned.apply(build(), data()))
    algo = SLB(weight="2bit@channel", total_steps=1, fused=True)
    net = algo.apply(net, data())
    with pytest.raises(ValueError, match="must be finite"):
        algo.convert(net, data() * float("nan"))
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), build)
    assert [entry["algorithm"] for entry in history(loaded)] == ["prune", "slb"]
    SLB.resume(loaded).convert(loaded, data())


def test_what_is_written_into_the_history_that_was_read_changes_nothing():
    net = SimQAT().apply(build(), data())
    read = history(net)
    read[0]["plan"][0]["settings"].clear()
    read[0]["steps"] = 9
    assert history(net)[0]["plan"][0]["settings"] and history(net)[0]["steps"] == 0


def test_a_converted_history_says_which_activations_its_layers_took_over():
    algo = SLB(weight="2bit@channel", act="int8@tensor:ema", total_steps=1)
    net = algo.convert(algo.apply(build(), data()))
    epilogues = [row["settings"]["epilogue"] for row in history(net)[0]["plan"]]
    assert [(e["activation"], e["op"]) for e in epilogues] == [("2", "silu"), ("4", "relu"), (None, None)]


@pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)
def test_convert_makes_a_new_plan_and_leaves_the_rows_it_was_given(make):
    algo = make()
    net = algo.apply(build(), data())
    given = history(net)[0]
    before = copy.deepcopy(given)
    rows = rows_of(given["plan"], algo.row_settings)
    _, new = algo.convert_layers(net, rows, data())
    assert [row.to_dict() for row in rows] == before["plan"] and given == before
    assert new != rows and [row.site for row in new] == [row.site for row in rows]
