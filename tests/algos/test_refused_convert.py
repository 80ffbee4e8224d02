"""A convert that is refused leaves the training whole: it can be saved, loaded, resumed and converted afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SLB, Prune, SimQAT
from gs_algos.core.algorithm import Algorithm, history
from gs_algos.qat import convert
from gs_algos.qat.slb_optim import SlbSGD
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

    monkeypatch.setattr(convert, "link", stop)
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


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the settings of every planned layer."""
    path = folder / "golden_stick.json"
    index = json.loads(path.read_text())
    for row in index["history"][0]["plan"]:
        if row["action"] != "keep":
            change(row["settings"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_searches_that_an_earlier_version_saved_go_on(fused, refused, tmp_path):
    algo = SLB(weight="2bit@channel", total_steps=1, fused=fused)
    net = algo.apply(build(), data())

    def as_it_was(settings: dict[str, Any]) -> None:
        settings["fused"] = settings.pop("fused_optimizer")
        if refused:  # by convert, which wrote into it
            settings.update(fused=["2", "silu"], notes=[])

    edit(gs_algos.save(net, tmp_path), as_it_was)
    loaded = gs_algos.load(tmp_path, build)
    assert history(loaded) == json.loads(json.dumps(history(net))) or refused
    resumed = SLB.resume(loaded)
    assert len(resumed.fused_layers()) == (3 if fused else 0)
    with torch.no_grad():
        want = algo.convert(net, data()).eval()(data())
        assert torch.equal(resumed.convert(loaded, data()).eval()(data()), want)


def test_a_converted_search_that_an_earlier_version_saved_loads(tmp_path):
    algo = SLB(weight="2bit@channel", act="int8@tensor:ema", total_steps=1)
    net = algo.convert(algo.apply(build(), data()))
    assert [row["settings"]["fused"] for row in history(net)[0]["plan"]] == [["2", "silu"], ["4", "relu"], None]
    edit(gs_algos.save(net, tmp_path), lambda settings: settings.pop("fused_optimizer"))
    with torch.no_grad():
        assert torch.equal(gs_algos.load(tmp_path, build).eval()(data()), net.eval()(data()))
