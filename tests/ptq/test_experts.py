"""Calibration of stacked experts: each on the tokens that come to it, packed into one stack again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import PTQ, quantize_weights
from gs_algos.core.algorithm import history
from gs_algos.ptq.experts import OpenExperts, opened
from gs_algos.quant.packed.experts import PackedExperts, PackedStack
from tests.helpers import relative_rms, same_bits
from tests.llm.test_experts import gpt_oss, llama4, mixtral, qwen, tokens

pytest.importorskip("transformers", reason="transformers is not installed; it is in the extra hf")
BATCHES = [{"input_ids": torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def calibrated(model: Any, batches: Any = None, **options: Any) -> PTQ:
    algo = PTQ(**{"weight": "int4@group:32", "refine": 1, **options})
    algo.apply(model, BATCHES[0])
    algo.calibrate(model, BATCHES if batches is None else batches)
    return algo


@torch.no_grad()
def error(model: Any, of: Any) -> float:
    return relative_rms(model(**BATCHES[0]).logits, of(**BATCHES[0]).logits)


@pytest.mark.parametrize("make", [mixtral, qwen, gpt_oss, llama4])
def test_calibrated_experts_are_nearer_to_the_float_ones_and_generate_as_saved(make: Any, tmp_path: Path):
    model = make()
    algo = calibrated(model)
    gs_algos.save(model, tmp_path / "prepared")
    model = algo.convert(model)
    assert error(model, make()) < 0.9 * error(quantize_weights(make(), "int4@group:32"), make())
    assert not [name for name, p in model.named_parameters() if "experts" in name and p.dim() > 2]
    want = tokens(model)
    gs_algos.save(model, tmp_path / "packed")
    assert tokens(gs_algos.load(tmp_path / "packed", make).eval()) == want
    resumed = gs_algos.load(tmp_path / "prepared", make)
    assert tokens(PTQ.resume(resumed).convert(resumed, BATCHES[0]).eval()) == want


def test_the_plan_has_a_row_for_every_expert_and_touches_nothing():
    model = mixtral()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    plan = PTQ(weight="int8@channel").plan(model, BATCHES[0])
    sites = [row.site for row in plan.acted() if "experts" in row.site]
    assert len(sites) == 2 * 4 * 2 and "model.layers.1.mlp.experts.3.down_proj" in sites
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert plan.totals is not None and plan.totals.numbers == sum(p.numel() for p in model.parameters())


def test_open_experts_compute_what_closed_ones_do():
    for make in (mixtral, gpt_oss, llama4):
        model = make()
        with torch.no_grad():
            want = model(**BATCHES[0]).logits
            with opened(model):
                assert any(isinstance(module, OpenExperts) for module in model.modules())
                assert relative_rms(model(**BATCHES[0]).logits, want) < 1e-5
        assert not any(isinstance(module, OpenExperts) for module in model.modules())


def test_an_expert_without_a_token_is_rounded_with_those_of_its_block():
    model = qwen()
    algo = calibrated(model, [{"input_ids": torch.tensor([[5, 9]])}])
    assert algo.report is not None
    idle = [one for one in algo.report.layers if "experts" in one.site and one.rows == 0]
    assert idle and all(any("saw 0 tokens" in note or "no token" in note for note in one.notes) for one in idle)
    model = algo.convert(model)
    assert sum(isinstance(module, PackedStack) for module in model.modules()) == 4


def test_one_expert_with_all_tokens():
    model = mixtral()
    for layer in model.model.layers:  # the same two for every token
        layer.mlp.gate.weight = nn.Parameter(torch.zeros_like(layer.mlp.gate.weight))
    algo = calibrated(model)
    assert algo.report is not None
    rows = {one.site: one.rows for one in algo.report.layers if "layers.0.mlp.experts" in one.site}
    assert sorted(set(rows.values())) == [0, 48]
    assert torch.isfinite(algo.convert(model)(**BATCHES[0]).logits).all()


def test_experts_read_floats_beside_rounded_rows_and_a_rule_keeps_whole_stacks():
    model = mixtral()
    algo = calibrated(model, act="int8@token", rules=[("re:.*layers.1.*experts.*down_proj", None)], rounding="nearest")
    model = algo.convert(model)
    plan = {row["site"]: row for row in history(model)[-1]["plan"]}
    assert plan["model.layers.0.mlp.experts.down_proj"]["settings"]["act"] is None
    assert plan["model.layers.0.self_attn.q_proj"]["settings"]["act"] == "int8@token"
    assert plan["model.layers.1.mlp.experts.down_proj"]["action"] == "keep"
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts) and isinstance(experts.down_proj, nn.Parameter)
    assert len(tokens(model)[0]) == 12


def test_experts_of_a_stack_that_differ_are_refused():
    with pytest.raises(
        ValueError, match=r"experts of model.layers.0.mlp.experts must have one scheme for their down_proj"
    ):
        PTQ(weight="int4@group:32", rules=[("model.layers.0.mlp.experts.2.down_proj", None)]).plan(
            mixtral(), BATCHES[0]
        )


def test_a_journal_goes_on_where_it_was(tmp_path: Path):
    first, second = mixtral(), mixtral()
    for model in (first, second):
        algo = PTQ(weight="int4@group:32", refine=1)
        algo.apply(model, BATCHES[0])
        algo.calibrate(model, BATCHES, journal=tmp_path / "journal")
        algo.convert(model)
    stacks = [[m.packed.codes for m in model.modules() if isinstance(m, PackedStack)] for model in (first, second)]
    assert all(same_bits(a, b) for a, b in zip(*stacks, strict=True))
