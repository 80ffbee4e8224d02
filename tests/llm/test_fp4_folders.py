"""4-bit floats on disk: what compressed-tensors wrote is imported, and what is exported it reads, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.module import Packed
from tests.nets.language_models import tiny_llama, tiny_tokenizer

KINDS = {"nvfp4": ("nvfp4-pack-quantized", "NVFP4A16"), "mxfp4": ("mxfp4-pack-quantized", "MXFP4A16")}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")


def compressed(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Writes a tiny Llama as the library compresses it; its decompressed weights by layer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization import apply_quantization_config as apply
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, preset = KINDS[name]
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    model = tiny_llama(False)
    apply(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form))
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "weight_scale")]
    for layer in map(model.get_submodule, layers):
        weight = layer.weight.detach()
        divisor = generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
        grouped = weight.view(weight.shape[0], -1, scheme.weights.group_size)
        scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, divisor)
        layer.weight_scale.data.copy_(scale)
        if divisor is not None:
            layer.weight_global_scale.data.copy_(divisor)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)
    compressor.decompress_model(model)
    return {name: model.get_submodule(name).weight.detach() for name in layers}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_language_model(folder)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, Packed)}


@pytest.mark.parametrize("name", list(KINDS))
def test_what_compressed_tensors_wrote_is_imported_bit_for_bit_and_goes_back_as_it_was(name: str, tmp_path: Path):
    want = compressed(tmp_path / "theirs", name)
    assert import_language_model(tmp_path / "theirs", tmp_path / "ours").layers == len(want) == 14
    got = weights_of(tmp_path / "ours")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[layer].to(want[layer].dtype), want[layer]) for layer in want)
    export_language_model(tmp_path / "ours", tmp_path / "back", "compressed-tensors")
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("theirs", "back"))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_rounded_here_is_what_the_library_reads_from_the_export(name: str, tmp_path: Path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = tiny_llama(False)
    model.save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed", name, progress=False)
    export_language_model(tmp_path / "packed", tmp_path / "out", "compressed-tensors")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    assert entry["format"] == KINDS[name][0]
    tensors, compressor = (
        load_file(tmp_path / "out" / "model.safetensors"),
        BaseCompressor.get_value_from_registry(KINDS[name][0]),
    )
    for layer, ours in weights_of(tmp_path / "packed").items():
        if f"{layer}.weight_packed" in tensors:
            parts = {
                key: tensors[f"{layer}.{key}"]
                for key in ("weight_packed", "weight_scale", "weight_global_scale")
                if f"{layer}.{key}" in tensors
            }
            assert torch.equal(compressor.decompress(parts, scheme)["weight"], ours.to(torch.bfloat16))


def test_bytes_of_the_plan_are_those_of_the_file(tmp_path: Path):
    tiny_llama(False).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    for name in KINDS:
        done = quantize_checkpoint(tmp_path / "float", tmp_path / name, name, progress=False)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert done.plan.totals.after == sum(t.nbytes for t in tensors.values())
        scales = [t for key, t in tensors.items() if key.endswith(".scale")]
        assert scales and all(t.itemsize == 1 for t in scales)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "mxfp6-pack-quantized"}, "must have format pack-quantized, nvfp4-pack-quantized, mxfp4-pack-qu"),
        ({"num_bits": 8}, "num_bits must be 4, got 8"),
        ({"type": "int"}, "type must be float, got 'int'"),
        ({"group_size": 16}, "group_size must be 32, got 16"),
        ({"strategy": "channel"}, "strategy must be group, got 'channel'"),
        ({"nan": 1}, "must be exponents below 255, which is NaN"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(change: dict, words: str, tmp_path: Path):
    compressed(tmp_path / "theirs", "mxfp4")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    entry = config["quantization_config"]
    group = next(iter(entry["config_groups"].values()))
    if "format" in change:
        entry["format"], group["format"] = change["format"], change["format"]
    elif "nan" in change:
        tensors = load_file(tmp_path / "theirs" / "model.safetensors")
        key = next(key for key in tensors if key.endswith("weight_scale"))
        tensors[key][3, 1] = 255
        save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    else:
        group["weights"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        import_language_model(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
