"""`quantize_checkpoint` at its first use: what it chooses, what it says, and what it refuses before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos import quantize_weights
from gs_algos.cli.app import run
from gs_algos.llm import quantize_checkpoint as checkpoint
from gs_algos.llm.interchange import export_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import logits, save_folder, save_gguf, tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("float") / "model", tiny_llama(False), torch.bfloat16)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=32, num_hidden_layers=2, num_local_experts=4, bos_token_id=1, **sizes)
    return save_folder(tmp_path_factory.mktemp("moe") / "model", MixtralForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("hidden", "inner", "chosen"),
    [(128, 256, "int4@group:128"), (192, 576, "int4@group:64"), (96, 96, "int4@group:32"), (80, 80, "int4@group:80"),
     (40, 60, "int4@group:20"), (24, 52, "int4@channel")],
)  # fmt: skip
def test_the_default_is_a_group_that_divides_every_layer(hidden: int, inner: int, chosen: str, tmp_path: Path):
    model = tiny_llama(False, hidden_size=hidden, intermediate_size=inner, num_key_value_heads=4)
    written = quantize_checkpoint(save_folder(tmp_path / "float", model), tmp_path / "out", progress=False)
    assert written.scheme.startswith(f"{chosen}:")
    assert written.notes[0].startswith(chosen)
    assert len(written.notes) == 1


def test_the_default_leaves_ruled_layers_out_of_the_count(source: Path, tmp_path: Path):
    rules = [("re:.*down_proj", "int8@channel")]  # 96 inputs, others 64
    assert (
        quantize_checkpoint(source, tmp_path / "out", rules=rules, progress=False)
        .notes[0]
        .startswith("int4@group:64, the largest of 128, 64 and 32 that divides")
    )


def test_layers_that_no_group_divides_get_whole_rows(tmp_path: Path):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 16, "num_hidden_layers": 1, "time_step_rank": 16}
    folder = save_folder(tmp_path / "float", MambaForCausalLM(MambaConfig(vocab_size=32, **sizes)).eval())
    written = quantize_checkpoint(folder, tmp_path / "out", progress=False)
    assert "1 as backbone.layers.0.mixer.conv1d, which get int4@channel" in written.notes[0]
    assert logits(load_language_model(tmp_path / "out")[0]).isfinite().all()


def test_the_command_says_what_it_chose_and_what_stays_float(moe: Path, tmp_path: Path, capsys: Any):
    rule = "re:.*experts.*=none"
    assert run(["quantize", str(moe), str(tmp_path / "out"), "--rule", rule]) == 0
    said = capsys.readouterr().out
    assert "9 weights packed, 7 kept float" in said
    assert "note: int4@group:64, the largest of 128, 64 and 32 that divides the inputs of every layer" in said
    total = sum(tensor.numel() for tensor in load_file(moe / "model.safetensors").values())
    (line,) = [line for line in said.splitlines() if "experts.gate_up_proj" in line]
    assert f"{4 * 192 * 64:,}" in line
    assert f"{100 * 4 * 192 * 64 / total:.1f}" in line


def test_experts_that_a_rule_keeps_are_rows_with_their_size(moe: Path, tmp_path: Path):
    rules = [("re:.*experts.*", None)]
    written = quantize_checkpoint(moe, tmp_path / "out", "int8@group:32", rules=rules, progress=False)
    sizes = {row.site: numbers for row, numbers in written.floats()}
    assert sizes["model.layers.1.mlp.experts.down_proj"] == 4 * 64 * 96
    assert all(row.reason for row, _ in written.floats())
    totals = written.plan.totals
    assert totals is not None
    assert sum(sizes.values()) <= totals.numbers - totals.quantized < sum(sizes.values()) + 1000
    from transformers import AutoModelForCausalLM

    float_model = AutoModelForCausalLM.from_pretrained(moe).eval()
    want = quantize_weights(float_model, "int8@group:32", rules=rules, progress=False)
    assert torch.equal(logits(load_language_model(tmp_path / "out")[0]), logits(want))


def test_conv1d_of_gpt2_is_packed_from_disk(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=32, n_positions=64)).eval()
    written = quantize_checkpoint(save_folder(tmp_path / "float", model), tmp_path / "out", "int8@group:32")
    assert {row.site.rpartition(".")[2] for row in written.plan.acted()} == {"c_attn", "c_proj", "c_fc"}
    want = quantize_weights(model, "int8@group:32", progress=False)
    assert torch.equal(logits(load_language_model(tmp_path / "out")[0]), logits(want))


def test_a_group_that_does_not_divide_is_found_by_the_headers(source: Path, tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("gguf", reason="the package gguf reads GGUF files")
    monkeypatch.setattr(checkpoint, "load_gguf", lambda *args: pytest.fail("read the tensors"))
    monkeypatch.setattr(checkpoint, "rounded", lambda *args: pytest.fail("rounded"))
    for path in (save_gguf(tmp_path / "a.gguf", tiny_llama()), source):
        with pytest.raises(ValueError, match="the group must divide the 64 inputs"):
            quantize_checkpoint(path, tmp_path / "out", "int4@group:48", progress=False)


def test_bytes_are_those_on_disk_and_rounding_twice_is_said(source: Path, tmp_path: Path):
    pytest.importorskip("gguf", reason="the package gguf reads GGUF files")
    import gguf

    path = save_gguf(tmp_path / "a.gguf", tiny_llama())
    written = quantize_checkpoint(path, tmp_path / "out", "int4@group:32", progress=False)
    assert written.before == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert written.notes == (
        f"{path} holds Q8_0 already, so its weights are rounded a second time; a float model gives a better one",
    )
    floats = quantize_checkpoint(source, tmp_path / "from-bf16", "int4@group:32", progress=False)
    assert floats.before == 2 * sum(t.numel() for t in load_file(source / "model.safetensors").values())
    assert floats.notes == ()


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


NORM = "model.layers.1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no norm": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"must hold {NORM}"),
    "no embedding": (lambda f: change_tensors(f, lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens.weight"),
    "another norm": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(65)})),
        rf"{NORM} .* must be \[64\] as config.json says, got \[65\]",
    ),
    "a bias nobody uses": (
        lambda f: change_tensors(f, lambda t: t.update({"lm_head.bias": torch.ones(32)})),
        "lm_head.bias too; what is left out would be lost",
    ),
    "two that are tied": (
        lambda f: change_config(f, tie_word_embeddings=True),
        "lm_head.weight .* must be model.embed_tokens.weight, to which config.json ties it",
    ),
    "a part that is quantized": (
        lambda f: change_config(f, text_config={"quantization_config": {"quant_method": "gptq"}}),
        "must have its quantization_config at the top",
    ),
    "settings beside it": (
        lambda f: (f / "quant_config.json").write_text('{"w_bit": 4}'),
        "quant_method 'awq', as .*quant_config.json says; rounding twice loses more, so import it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_is_not_whole_is_refused_by_name(case: str, source: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(checkpoint, "rounded", lambda *args: pytest.fail("rounded"))
    spoil, words = REFUSED[case]
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", "int4@group:32", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_missing_is_named(moe: Path, tmp_path: Path):
    folder = Path(shutil.copytree(moe, tmp_path / "copy"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    change_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=name):
        quantize_checkpoint(folder, tmp_path / "out", "int4@group:32", progress=False)


def test_quantized_folders_are_sent_to_where_they_belong(source: Path, tmp_path: Path):
    quantize_checkpoint(source, tmp_path / "packed", "int4@group:32", progress=False)
    export_language_model(tmp_path / "packed", tmp_path / "gptq", "gptq")
    with pytest.raises(ValueError, match=r"quant_method 'golden-stick', .*so give the float model"):
        quantize_checkpoint(tmp_path / "packed", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"quant_method 'gptq', .*so import it with golden-stick import"):
        quantize_checkpoint(tmp_path / "gptq", tmp_path / "out", progress=False)
    change_config(tmp_path / "gptq", quantization_config=None)
    with pytest.raises(ValueError, match=r"q_proj\.g_idx: it is quantized already, and no quantization_config says"):
        quantize_checkpoint(tmp_path / "gptq", tmp_path / "out", "int4@group:32", progress=False)
