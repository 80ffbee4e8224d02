"""Experts in other libraries' folders: linears of single experts, and MX blocks, become stacks and go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos import quantize_weights
from gs_algos.cli.serve import serve_command
from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.experts import PackedStack
from tests.helpers import relative_rms, same_bits
from tests.llm.test_experts import IDS, gpt_oss, mixtral, qwen
from tests.nets.language_models import tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the extra hf")


def packed(make: Any, scheme: str, path: Path) -> Path:
    make().save_pretrained(path / "float")
    tiny_tokenizer().save_pretrained(path / "float")
    quantize_checkpoint(path / "float", path / "packed", scheme, progress=False)
    return path / "packed"


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load_language_model(folder)[0](IDS).logits


@pytest.mark.parametrize("make", [mixtral, qwen])
@pytest.mark.parametrize(
    ("scheme", "to"),
    [("int4@group:32", "compressed-tensors"), ("int4@group:32:asym", "gptq"), ("nvfp4", "compressed-tensors"),
     ("mxfp4", "compressed-tensors")],
)  # fmt: skip
def test_experts_are_exported_one_by_one_and_imported_as_stacks(make: Any, scheme: str, to: str, tmp_path: Path):
    folder = packed(make, scheme, tmp_path)
    export_language_model(folder, tmp_path / "out", to)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    marker = "weight_packed" if to == "compressed-tensors" else "qweight"
    per_expert = [name for name in names if ".experts.1." in name and name.endswith(marker)]
    assert len(per_expert) == 2 * 3  # gate, up and down of two layers
    import_language_model(tmp_path / "out", tmp_path / "back")
    assert same_bits(logits(tmp_path / "back"), logits(folder))


@pytest.mark.parametrize("make", [mixtral, qwen])
@torch.no_grad()
def test_exported_experts_are_read_by_compressed_tensors_own_library(make: Any, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder = packed(make, "int4@group:32", tmp_path)
    export_language_model(folder, tmp_path / "out", "compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative_rms(theirs(IDS).logits, logits(folder)) < 2e-3  # it multiplies codes and scales in fp16


def test_a_saved_model_whose_modules_have_other_names_in_folders_is_taken(tmp_path: Path, monkeypatch: Any):
    folder = packed(mixtral, "int4@group:32", tmp_path)
    model, _ = load_language_model(folder)
    model.save_pretrained(tmp_path / "saved")
    assert any("block_sparse_moe.experts.down_proj" in name for name in load_file(tmp_path / "saved/model.safetensors"))
    monkeypatch.setattr("shutil.which", lambda name: name)  # vLLM need not be here
    assert str(tmp_path / "saved") in serve_command(tmp_path / "saved")
    for name in ("packed", "saved"):
        export_language_model(tmp_path / name, tmp_path / f"of {name}", "compressed-tensors")
    want, got = (load_file(tmp_path / f"of {name}" / "model.safetensors") for name in ("packed", "saved"))
    assert want.keys() == got.keys() and all(same_bits(got[name], tensor) for name, tensor in want.items())


def test_the_router_is_named_as_float(tmp_path: Path):
    export_language_model(packed(mixtral, "int4@group:32", tmp_path), tmp_path / "out", "compressed-tensors")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.block_sparse_moe.gate" in entry["ignore"]


def test_an_expert_that_is_missing_is_named(tmp_path: Path):
    export_language_model(packed(qwen, "int4@group:32", tmp_path), tmp_path / "out", "compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if ".layers.1.mlp.experts.5.up_proj." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"all experts of a stack .* got no model\.layers\.1\.mlp\.experts\.5\.up_proj"
    ):
        import_language_model(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_stacks_without_names_for_single_experts_are_exported_as_floats(tmp_path: Path):
    done = export_language_model(packed(gpt_oss, "mxfp4", tmp_path), tmp_path / "out", "compressed-tensors")
    assert len(done.floats) == 4 and all(name.endswith("_proj") for name in done.floats)
    assert load_file(tmp_path / "out" / "model.safetensors")[done.floats[0]].dim() == 3


def blocks(path: Path) -> dict[str, torch.Tensor]:
    """Writes a folder as gpt-oss has it: random blocks and scales; what Transformers makes of the experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    gpt_oss().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tensors, dense = load_file(path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        e, k, n = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (e, n, k // 32), dtype=torch.uint8, generator=generator)
        scales[0, 0, 0], scales[0, 1, 0] = 0, 1  # the smallest: floats without a leading one
        tensors[f"{name}_scales"] = scales
        dense[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], scales)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    return dense


def test_blocks_of_gpt_oss_are_imported_with_the_values_of_transformers_bit_for_bit(tmp_path: Path):
    dense = blocks(tmp_path / "theirs")
    assert import_language_model(tmp_path / "theirs", tmp_path / "ours").layers == 4
    model, _ = load_language_model(tmp_path / "ours")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, PackedStack)}
    assert stacks.keys() == dense.keys()
    for name, stack in stacks.items():
        assert stack.packed.scale.itemsize == 1
        assert same_bits(stack.weight.to(torch.bfloat16).contiguous(), dense[name])
    assert torch.isfinite(model(IDS).logits).all()


def test_blocks_of_gpt_oss_come_back_bit_for_bit_as_they_were(tmp_path: Path):
    blocks(tmp_path / "theirs")
    import_language_model(tmp_path / "theirs", tmp_path / "ours")
    done = export_language_model(tmp_path / "ours", tmp_path / "back", "mxfp4")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert (done.layers, done.floats) == (4, ()) and want.keys() == got.keys()
    assert all(same_bits(got[name], tensor) for name, tensor in want.items())


def test_a_gpt_oss_packed_here_is_read_by_transformers(tmp_path: Path):
    folder = packed(gpt_oss, "mxfp4", tmp_path)
    done = export_language_model(folder, tmp_path / "out", "mxfp4")
    assert done.layers == 4 and "model.layers.0.self_attn.q_proj" in done.floats
    config = transformers.Mxfp4Config(dequantize=True)  # which it does of itself without a GPU, with a warning
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    ours, _ = load_language_model(folder)
    stacks = {name: module for name, module in ours.named_modules() if isinstance(module, PackedStack)}
    for name, stack in stacks.items():
        assert same_bits(model.get_parameter(name).contiguous(), stack.weight.contiguous())
    with torch.no_grad():
        assert relative_rms(model(IDS).logits, ours(IDS).logits) < 1e-5


@pytest.mark.parametrize(
    ("make", "rules", "words"),
    [
        (qwen, [], "a model must be a gpt-oss .*, got a Qwen3MoeForCausalLM; export it to compressed-tensors"),
        (gpt_oss, [("re:.*down_proj", "int4@group:32")], "down_proj, as every stack .* mxfp4, got 4 bits, float"),
        (gpt_oss, [("re:.*1.mlp.experts.gate_up_proj", None)], r"1\.mlp\.experts\.gate_up_proj, as .*, got floats"),
    ],
)
def test_what_is_no_gpt_oss_in_mxfp4_is_refused(make: Any, rules: list[Any], words: str, tmp_path: Path):
    model = quantize_weights(make(), "mxfp4", rules=rules)
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=words):
        export_language_model(tmp_path / "packed", tmp_path / "out", "mxfp4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t, c: t["model.layers.0.mlp.experts.down_proj_scales"][1, 2].fill_(255),
            "exponents below 255, which is N",
        ),
        (lambda t, c: t.pop("model.layers.1.mlp.experts.gate_up_proj_scales"), "must hold .*gate_up_proj_scales"),
        (lambda t, c: t.pop("model.layers.1.mlp.experts.down_proj_blocks"), "down_proj"),
        (
            lambda t, c: c["quantization_config"].update(kv_cache=8),
            "keys must be those that are used here, got kv_cache",
        ),
        (lambda t, c: c["quantization_config"].update(quant_method="mxfp6"), "quant_method must be one of .*mxfp4"),
    ],
)
def test_blocks_that_are_not_whole_are_refused(change: Any, words: str, tmp_path: Path):
    blocks(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "theirs" / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        import_language_model(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
