"""Mixtures of experts: stacked experts are packed, saved, loaded and served by Transformers with the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gs_algos
from gs_algos import plan_weights, quantize_weights
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.experts import PackedExperts, PackedStack
from gs_algos.quant.packed.module import Packed
from gs_kernels import dequantize_packed
from tests.helpers import relative_rms, same_bits
from tests.nets.language_models import tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the extra hf")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    more = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **more)).eval()


def gpt_oss() -> Any:
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **more)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            torch.nn.init.normal_(parameter)
    return model


def llama4() -> Any:
    torch.manual_seed(0)
    more = {"intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, **more)).eval()


FAMILIES = [mixtral, qwen, gpt_oss, llama4]
IDS = torch.tensor([[5, 17, 3, 80, 4, 4, 9], [6, 2, 95, 33, 1, 60, 7]])


def tokens(model: Any) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()


def floats_left(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if "experts" in name and parameter.dim() > 2]


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("scheme", ["int4@group:32:asym", "nvfp4"])
def test_packed_experts_compute_what_their_dequantized_weights_do(make: Callable[[], Any], scheme: str):
    model, plain = make(), make()
    plan = plan_weights(model, scheme)
    quantize_weights(model, scheme)
    assert not floats_left(model) and any(isinstance(module, PackedExperts) for module in model.modules())
    held = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    assert plan.totals.after == sum(held.values())
    state = plain.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            state[name if name in state else f"{name}.weight"] = module.weight
    plain.load_state_dict(state)
    with torch.no_grad():
        assert relative_rms(model(IDS).logits, plain(IDS).logits) < 1e-5
    assert tokens(model) == tokens(plain)


@pytest.mark.parametrize("make", FAMILIES)
def test_saved_experts_come_back_by_both_ways_and_generate_the_same_tokens(make: Callable[[], Any], tmp_path: Path):
    model = quantize_weights(make(), "int4@group:32")
    want = tokens(model)
    gs_algos.save(model, tmp_path / "ours")
    assert tokens(gs_algos.load(tmp_path / "ours", make).eval()) == want
    model.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert tokens(again) == want and not floats_left(again)
    again.save_pretrained(tmp_path / "twice")
    assert tokens(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) == want


@pytest.mark.parametrize("make", FAMILIES)
def test_a_folder_is_packed_as_the_model_is(make: Callable[[], Any], tmp_path: Path):
    model = make()
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    done = quantize_checkpoint(tmp_path / "float", tmp_path / "packed", "nvfp4", progress=False)
    loaded, _ = load_language_model(tmp_path / "packed")
    quantize_weights(model, "nvfp4")
    with torch.no_grad():
        assert same_bits(loaded(IDS).logits, model(IDS).logits)
    assert done.after == done.plan.totals.after and not floats_left(loaded)
    half, _ = load_language_model(tmp_path / "packed", dtype=torch.bfloat16)
    stacks = [[m.packed for m in one.modules() if isinstance(m, PackedStack)] for one in (loaded, half)]
    for a, b in zip(*stacks, strict=True):  # tables and divisors, too, keep their dtypes
        assert same_bits(dequantize_packed(a), dequantize_packed(b))


def test_experts_of_the_oldest_transformers_are_found():
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts.__dict__.pop("has_post_expert_norm", None)  # which it does not have
    assert not floats_left(quantize_weights(model, "int8@channel"))


def test_rules_name_experts_and_what_they_keep_is_a_row():
    model = mixtral()
    rules = [("re:.*down_proj", None), ("re:.*layers.1.*gate_up_proj", "int8@channel")]
    quantize_weights(model, "int4@group:32", rules=rules)
    rows = {row["site"]: row for row in gs_algos.core.algorithm.history(model)[-1]["plan"]}
    assert rows["model.layers.0.mlp.experts.down_proj"]["reason"] == "kept by a rule"
    stacks = {name: module.bits for name, module in model.named_modules() if isinstance(module, PackedStack)}
    assert stacks == {"model.layers.0.mlp.experts.gate_up_proj": 4, "model.layers.1.mlp.experts.gate_up_proj": 8}
    assert len(tokens(model)[0]) == 12


def test_a_group_that_does_not_divide_is_refused_and_nothing_is_changed():
    model = mixtral()
    with pytest.raises(ValueError, match="the group must divide the 64 inputs"):
        quantize_weights(model, "int4@group:48")
    assert len(floats_left(model)) == 4


@pytest.mark.parametrize("which", ["one with all", "no token"])
def test_experts_without_tokens_and_one_with_all(which: str):
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(0 if which == "no token" else 9, 64)
    index = torch.zeros(len(x), 2, dtype=torch.int64)
    index[:, 1] = 3
    weights = torch.rand(len(x), 2)
    with torch.no_grad():
        want = experts(x, index, weights)
        quantize_weights(model, "int8@channel")
        got = model.model.layers[0].mlp.experts(x, index, weights)
    assert got.shape == want.shape and (len(x) == 0 or relative_rms(got, want) < 0.02)


def test_gradients_pass_packed_experts_to_what_is_before_them():
    model = quantize_weights(mixtral(), "int8@channel")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 2], [3, 0]]), torch.rand(5, 2)
    experts(x, index, weights).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool((x.grad != 0).any(1).all())


def test_values_that_are_not_finite_are_refused_before_anything_is_packed():
    model = qwen()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.* must be finite"):
        quantize_weights(model, "int8@channel")
    assert len(floats_left(model)) == 4
