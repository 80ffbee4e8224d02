"""How long layers take in each packed form. No test asserts how long anything takes."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn

from gs_algos.analysis import latency_table as module
from gs_algos.analysis import layer_timer
from gs_algos.analysis.between_layers import MIXED, fit, shares
from gs_algos.analysis.latency_table import LatencyTable, PolicyTime, latency_table
from tests.nets.convolutional import SmallConvNet, images, mlp
from tests.nets.language_models import IDS, tiny_llama

STATIC = "int8@channel/int8@tensor"
QUICK = {"seconds": 0.0, "policies": 0}


class Twins(nn.Sequential):
    """Two layers of one shape, and one of another."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.fixture
def timed(monkeypatch) -> list[int]:
    """How many calls each round of timing had."""
    counts: list[int] = []
    times = module.time_in_turns

    def count(calls, device, seconds):
        counts.append(len(calls))
        return times(calls, device, seconds)

    for place in (module, layer_timer):
        monkeypatch.setattr(place, "time_in_turns", count)
    return counts


def test_every_layer_has_each_choice():
    found = latency_table(SmallConvNet(), images(2), (STATIC, "int4@channel"), **QUICK)
    assert list(found.layers) == ["stem", "block.conv1", "block.conv2", "block.project.0", "fc"]
    assert all(set(times) == {"float", STATIC, "int4@channel"} for times in found.layers.values())
    assert found.weights["fc"] == 8 and found.batch == 2


def test_layers_that_are_alike_are_timed_once(timed):
    found = latency_table(Twins(), torch.ones(2, 16), ("int8@channel",), **QUICK)
    assert timed == [2, 0, 2, 2]  # the third are whole networks
    assert found.layers["0"] == found.layers["2"]


def test_a_file_is_gone_on_with(timed, tmp_path):
    path = tmp_path / "deep" / "times.json"
    latency_table(Twins(), torch.ones(2, 16), ("int8@channel",), path=path, **QUICK)
    first = json.loads(path.read_text())["rows"]
    del timed[:]
    latency_table(Twins(), torch.ones(2, 16), ("int8@channel", "int4@channel"), path=path, **QUICK)
    assert timed[:3] == [1, 0, 1]
    assert len(first) == 4 and json.loads(path.read_text())["rows"][:4] == first
    assert {"instructions", "device_name", "torch", "golden_stick", "x", "scheme"} <= first[0].keys()


def test_an_interrupted_run_keeps_what_was_timed(monkeypatch, tmp_path):
    add = module.LayerTimer.add

    def stop(self, name, *rest):
        if name == "3":
            raise KeyboardInterrupt
        add(self, name, *rest)

    monkeypatch.setattr(module.LayerTimer, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        latency_table(Twins(), torch.ones(2, 16), ("int8@channel",), path=tmp_path / "times.json", **QUICK)
    assert len(json.loads((tmp_path / "times.json").read_text())["rows"]) == 2


def test_other_shapes_and_threads_are_other_problems(timed, tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    latency_table(mlp(), torch.ones(2, 16), (), path=path, **QUICK)
    del timed[:]
    latency_table(mlp(), torch.ones(2, 16), (), batch=5, path=path, **QUICK)
    assert timed[:3] == [1, 1, 1]
    facts = module.machine("cpu")
    monkeypatch.setattr(module, "machine", lambda device: {**facts, "threads": 99})
    del timed[:]
    latency_table(mlp(), torch.ones(2, 16), (), path=path, **QUICK)
    assert timed[:3] == [1, 1, 1]


def table(**more) -> LatencyTable:
    layers = {
        "a": {"float": 4.0, STATIC: 2.0, "int4@channel": 5.0},
        "b": {"float": 3.0, STATIC: 1.0, "int4@channel": 4.0},
        "c": {"float": 1.0},
    }
    rest = {"float": 2.0, STATIC: 1.0, "int4@channel": 5.0}
    return LatencyTable(10.0, layers, rest, {"a": 30, "b": 10, "c": 5}, 1, **more)


def test_a_prediction_is_the_sum_of_layers_and_what_lies_between():
    assert table().predict({}) == 10.0
    assert table().predict({"a": "int4@channel", "b": "int4@channel"}) == 5 + 4 + 1 + 5
    assert table().predict({"a": "int4@channel"}) == 5 + 3 + 1 + 2 + 3 * 30 / 40


def test_codes_save_time_between_layers_that_both_have_them():
    assert table().predict({"a": STATIC, "b": STATIC}) == 2 + 1 + 1 + 1
    assert table().predict({"a": STATIC}) == 2 + 3 + 1 + 2


def test_a_network_with_one_choice_is_predicted_as_measured():
    net = SmallConvNet()
    found = latency_table(net, images(2), (STATIC,), seconds=0.0, policies=0)
    every = dict.fromkeys(found.layers, STATIC)
    assert found.predict(every) == pytest.approx(sum(t[STATIC] for t in found.layers.values()) + found.rest[STATIC])
    assert found.predict({}) == pytest.approx(found.total)


def test_what_lies_between_layers_is_fitted_to_mixed_networks():
    weights = {str(i): 10 + i for i in range(8)}
    choices = (STATIC, "int4@channel/int8@tensor", "int4@channel")
    draw = random.Random(0)
    policies = [dict.fromkeys(weights, choice) for choice in choices]
    policies += [{name: draw.choice(("float", *choices)) for name in weights} for _ in range(12)]
    found = [shares(policy, weights, lambda choice: list(weights)) for policy in policies]
    true = dict(zip((*choices, *MIXED), (-5.0, -4.0, 2.0, 1.5, 0.8, 0.5, -0.5, -1.0), strict=True))
    between = [sum(true[key] * share for key, share in row.items()) for row in found]
    known = {choice: between[i] for i, choice in enumerate(choices)}
    rows = found, known, between, [20 + ms for ms in between]
    fitted = fit(*rows)
    for row, ms in zip(found, between, strict=True):
        assert sum(fitted[key] * share for key, share in row.items()) == pytest.approx(ms, abs=0.2)
    rows[2][5] += 15  # something else ran beside one
    rows[3][5] += 15
    strange = fit(*rows)
    for row, ms in zip(found[6:], between[6:], strict=True):
        assert sum(strange[key] * share for key, share in row.items()) == pytest.approx(ms, abs=1)


@pytest.mark.parametrize(
    ("choice", "stored"),
    [
        ("int3@channel:mse", "int4@channel"),
        ("int4@channel:narrow", "int4@channel"),
        ("int5@channel/int4@tensor:ema", STATIC),
        ("int8@channel:lsq/int8@tensor:mse", STATIC),
    ],
)
def test_a_width_is_read_as_the_one_that_its_codes_are_stored_in(choice, stored):
    assert table().predict({"a": choice, "b": choice}) == table().predict({"a": stored, "b": stored})


def test_every_width_of_weights_is_read_from_a_table_of_the_default_choices():
    found = latency_table(mlp(), torch.ones(2, 16), **QUICK)
    assert set(found.layers["0"]) == {"float", STATIC, *(f"int{bits}@channel" for bits in (1, 2, 4, 8))}
    assert all(found.predict({"0": f"int{bits}@channel"}) > 0 for bits in range(1, 9))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"d": "float"}, "d must be given a layer of the table"),
        ({"c": STATIC}, "c must be given one of float, got"),
        ({"a": "int2@channel"}, "one of float, int8"),
        ({"a": "int8@tensor"}, "one of float, int8"),
    ],
)
def test_a_policy_must_be_in_the_table(policy, words):
    with pytest.raises(ValueError, match=words):
        table().predict(policy)


def test_random_networks_say_how_well_they_are_predicted():
    found = latency_table(SmallConvNet(), images(2), (STATIC, "int4@channel"), seconds=0.0, policies=3)
    assert len(found.checks) == 3 and found.error is not None
    assert all(one.measured > 0 and set(one.policy) == set(found.layers) for one in found.checks)


def test_a_bad_prediction_is_said():
    bad, good = (PolicyTime({}, 12.0, measured) for measured in (10.0, 11.9))
    assert "20.0 %, more than 10 %: choose nothing by these times" in str(table(checks=(bad,)))
    assert "more than" not in str(table(checks=(good,)))


class Padded(nn.Conv2d):
    """Pads by itself, so that other outputs come out of the same geometry."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_a_layer_with_a_forward_of_its_own_has_integers_alone(timed):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), Padded(4, 4, 3))
    found = latency_table(net, torch.ones(1, 4, 8, 8), (STATIC, "int4@channel"), **QUICK)
    assert set(found.layers["0"]) == {"float", STATIC, "int4@channel"}
    assert set(found.layers["1"]) == {"float", STATIC}
    assert "without int4@channel: Padded has a forward of its own: 1" in str(found)
    assert timed[0] == 3 and timed[1] == 2


def test_a_layer_that_cannot_have_a_choice_says_why():
    found = latency_table(mlp(), torch.ones(2, 16), ("int4@group:32",), **QUICK)
    assert set(found.layers["0"]) == {"float"} and "int4@group:32" in found.layers["2"]
    assert "without int4@group:32: " in str(found)


def test_a_language_model_has_inputs_by_token_too():
    found = latency_table(tiny_llama(), IDS, ("int8@channel/int8@token", "int4@group:32"), **QUICK)
    assert set(found.layers["model.layers.0.mlp.up_proj"]) == {"float", "int8@channel/int8@token", "int4@group:32"}
    assert "lm_head" not in found.layers  # its weight is the embedding's


def test_the_network_is_left_as_it_was():
    net = SmallConvNet().train()
    latency_table(net, images(2), (STATIC,), **QUICK)
    assert net.training and type(net.stem) is nn.Conv2d
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"choices": ("int9@channel",)}, "1 to 8 bits"),
        ({"choices": ("int8@channel/int8@channel",)}, "one scale per tensor"),
        ({"batch": 0}, "batch must be a whole number from 1 on, got 0"),
        ({"policies": -1}, "policies and seconds must be 0 or more"),
        ({"inputs": torch.ones(2, 5)}, "the inputs must run through the model"),
        ({"net": nn.ReLU()}, "must run a linear or a convolution"),
    ],
)
def test_wrong_input_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        latency_table(**{"net": mlp(), "inputs": torch.ones(2, 16), **QUICK, **arguments})


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "version": 1}'])
def test_a_file_of_another_kind_is_refused_and_stays(text, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a golden-stick latency table, version 1"):
        latency_table(mlp(), torch.ones(2, 16), path=path, **QUICK)
    assert path.read_text() == text


def test_a_packed_network_is_refused():
    import gs_algos

    net = gs_algos.quantize_weights(mlp(), "int4@channel")
    with pytest.raises(ValueError, match="must be float, got a packed layer at 0; use layer_times"):
        latency_table(net, torch.ones(2, 16), **QUICK)
