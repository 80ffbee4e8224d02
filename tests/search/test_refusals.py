"""What cannot be searched is refused in one line that says what can be done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gs_algos import Prune, SimQAT
from gs_algos.analysis.latency_table import LatencyTable, PolicyTime
from gs_algos.core.machine import machine
from gs_algos.search.search import search_rules
from tests.search.nets import data, found, images, net


def test_a_budget_that_cannot_be_met_says_the_best_that_can_be():
    with pytest.raises(
        ValueError, match=r"must allow at least ([\d,]+) bytes \(([\d.]+) % of the float network\)"
    ) as told:
        found(budget="5% bytes")
    least = int(str(told.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    before = sum(p.numel() * 4 for p in net().parameters())
    assert found(budget=f"{100 * least / before + 1e-6:.8f}% bytes", evaluations=1).costs["bytes"] == least


def test_budgets_that_exclude_each_other_are_refused():
    options = {"choices": ("int2@channel", "int8@channel"), "acts": ("int2@tensor", "int8@tensor")}
    with pytest.raises(ValueError, match=r"at least .* bytes .* and at least .* bit operations"):
        found(SimQAT(), budget="5% bytes, 0.1% bops", **options)


@pytest.mark.parametrize(
    "budget, words",
    [
        ("50% macs", "a budget must be of a cost that the knobs change, got 50% macs for knobs of weight"),
        ("50 apples", "budget must be like '40% bytes', '80 MB', '3 bits'"),
        ("0% bytes", "budget must be like"),
        ("40% bytes, 3 bits", "budget must be one, or two of different kinds"),
        ("1% bytes, 2% bops, 3 ms", "budget must be one, or two of different kinds"),
    ],
)
def test_a_wrong_budget(budget, words):
    with pytest.raises(ValueError, match=words):
        found(budget=budget)


def test_bits_are_for_weights():
    with pytest.raises(ValueError, match="a budget of bits must be for knobs of weights alone"):
        found([Prune(), SimQAT()], budget="3 bits")


def test_a_knob_with_one_value_is_dropped_in_words():
    choices = ("int4@group:24", "int8@group:24")  # 24 divides the weights of an output in all layers but 0, 14 and 16
    policy = found(choices=("int8@channel", *choices), budget="50% bytes", evaluations=1)
    assert "14 has one weight alone, int8@channel:minmax:sym, and no knob" not in policy.notes  # 24 divides those of 14
    one = SimQAT(act=None, rules=[("0", None), ("3", None)])
    policy = found(one, choices=("int8@channel", "int4@group:144"), budget="90% bytes", evaluations=1)
    assert policy.notes[0] == "14 has one weight alone, int8@channel:minmax:sym, and no knob"


def test_a_value_that_saves_nothing_is_left_out_in_words():
    policy = found(choices=("int3@channel", "int4@channel", "int8@channel"), budget="20% bytes", evaluations=1)
    assert any("cannot save bytes by int3@channel" in note for note in policy.notes)
    assert not any("int3" in str(value) for value in policy.setting["weight"].values())


def test_a_score_that_is_nan_is_refused():
    scores = iter([1.0, 0.5, float("nan")])
    with pytest.raises(ValueError, match=r"evaluate must return a number, got NaN for the network with .*weight int"):
        found(evaluate=lambda network: next(scores), agent="random", budget="20% bytes")


def test_fewer_data_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="data must hold at least as many samples as the example inputs, 4, got 3"):
        search_rules(net(), images(4), SimQAT(), [images(3)])
    loader = torch.utils.data.DataLoader(images(3), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="got 0; a loader with drop_last=True leaves out a batch that is not full"):
        search_rules(net(), images(), SimQAT(), loader)


def test_nothing_to_choose_is_refused():
    rules = [("re:.*", {"weight": "int4@channel"})]
    with pytest.raises(ValueError, match="at least one layer must have a choice of values that no rule sets"):
        found(SimQAT(act=None, rules=rules))


def test_a_choice_that_the_algorithm_cannot_have_is_refused_before_anything_is_measured():
    def never(network):
        raise AssertionError("measured")

    with pytest.raises(ValueError, match=r"choices: .*rate must be in \[0, 1\), got 1.5"):
        found(Prune(), choices=(0.0, 1.5), budget="50% macs", evaluate=never)
    with pytest.raises(ValueError, match="search: choices: Scheme: weight must look like"):
        found(choices=("int4",), evaluate=never)


def test_what_has_no_rules_cannot_be_searched():
    with pytest.raises(TypeError, match="algorithms must be such as"):
        search_rules(net(), images(), [nn.ReLU()], data())  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one algorithm must be given"):
        search_rules(net(), images(), [], data())


def test_a_pruner_with_a_budget_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match="prune must have no budget of its own, got '50% flops'; give it to the search"
    ):
        found(Prune(budget="50% flops"), budget="50% macs")


def test_tune_needs_evaluate():
    with pytest.raises(ValueError, match="tune needs evaluate"):
        found(tune=lambda network, algorithm: None)


def table(**facts) -> LatencyTable:
    choices = {"float": 1.0, "int2@channel": 0.2, "int4@channel": 0.3, "int8@channel": 0.5}
    layers = {name: dict(choices) for name in ("0", "3", "6", "9", "14", "16")}
    rest = dict.fromkeys(choices, 0.1)
    here = {**machine("cpu"), **facts}
    return LatencyTable(6.1, layers, rest, dict.fromkeys(layers, 1), 2, machine=here)


def test_a_latency_table_decides():
    policy = found(latency=table(), budget="2.2 ms", evaluations=1)
    assert policy.costs["latency"] <= 2.2


def test_a_latency_table_of_another_machine_is_refused():
    with pytest.raises(ValueError, match=r"must be of this machine and these versions, got one of torch 1\.0, here"):
        found(latency=table(torch="1.0"), budget="2 ms")
    with pytest.raises(ValueError, match="got one of device cuda, here cpu; measure it here by golden-stick latency"):
        found(latency=table(device="cuda"), budget="2 ms")


def test_a_file_of_times_of_another_machine_is_refused(tmp_path):
    (tmp_path / "t.json").write_text(
        '{"format": "golden-stick latency table", "version": 1, "rows": [{"device": "x"}]}'
    )
    with pytest.raises(ValueError, match=r"t.json must be of this machine and these versions, got one of device x"):
        found(latency=tmp_path / "t.json", budget="2 ms")


def test_a_table_that_five_networks_contradict_is_refused():
    checks = tuple(PolicyTime({}, 1.0, ms) for ms in (1.0, 1.2, 1.3, 1.2, 1.05))
    with pytest.raises(ValueError, match=r"must predict whole networks within 10 %, got 17 % in the median of 5"):
        found(latency=replace(table(), checks=checks), budget="2 ms")


def test_a_table_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="must be of forwards of 2, as the example inputs, got 64"):
        found(latency=replace(table(), batch=64), budget="2 ms")


def test_milliseconds_of_pruned_networks_are_refused():
    with pytest.raises(ValueError, match="a budget of latency must be for knobs of weights and inputs, got"):
        found(Prune(), latency=table(), budget="2 ms")


def test_the_networks_that_a_table_is_checked_by_are_those_of_the_search(monkeypatch):
    asked = {}

    def measured(network, inputs, choices, **options):
        asked.update(options, choices=choices)
        return table()

    monkeypatch.setattr("gs_algos.search.times.latency_table", measured)
    found(choices=("int4@channel", "int8@channel"), budget="3 ms", evaluations=1)
    assert len(asked["policies"]) == 5
    values = {value for policy in asked["policies"] for value in policy.values()}
    assert values == set(asked["choices"]) == {"int4@channel:minmax:sym", "int8@channel:minmax:sym"}
