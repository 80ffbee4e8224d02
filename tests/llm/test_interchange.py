"""Packed language models in the formats of other libraries, and back: the same weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos.cli.app import run
from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.module import Packed
from tests.helpers import relative_rms
from tests.nets.language_models import logits, save_folder, tiny_llama

UNEVEN = [("model.layers.1.mlp", "int8@channel"), ("re:.*v_proj", None)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that packs a tiny Llama with the given schemes, once each."""
    made: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("packed")
    sources = {tied: save_folder(base / f"float-{tied}", tiny_llama(tied)) for tied in (True, False)}

    def pack(weights: str, tied: bool = True, **options: Any) -> Path:
        key = f"{weights}-{tied}-{options}"
        if key not in made:
            made[key] = base / f"packed-{len(made)}"
            quantize_checkpoint(sources[tied], made[key], weights, progress=False, **options)
        return made[key]

    return pack


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The dequantized weight of every packed layer."""
    model, _ = load_language_model(folder)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, Packed)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


CASES = {
    "compressed-tensors": ["int2@group:32", "int4@group:32:asym", "int8@channel"],
    "gptq": ["int2@group:32", "int4@group:32:asym", "int8@channel"],
    "awq": ["int4@group:32", "int4@channel:asym"],
}


@pytest.mark.parametrize("to, weights", [(to, weights) for to in CASES for weights in CASES[to]])
def test_what_was_exported_is_imported_as_it_was(to: str, weights: str, packed: Any, tmp_path: Path):
    source = packed(weights)
    done = export_language_model(source, tmp_path / "out", to)
    assert (done.layers, done.floats) == (14, ())
    assert import_language_model(tmp_path / "out", tmp_path / "back").layers == 14
    want, got = weights_of(source), weights_of(tmp_path / "back")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(logits(load_language_model(tmp_path / "back")[0]), logits(load_language_model(source)[0]))
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_compressed_tensors_get_the_config_of_llm_compressor(packed: Any, tmp_path: Path):
    export_language_model(packed("int4@group:32", rules=UNEVEN), tmp_path / "out", "compressed-tensors")
    config = config_of(tmp_path / "out")
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    groups = sorted(config["config_groups"].values(), key=lambda group: group["weights"]["num_bits"])
    assert [group["weights"]["strategy"] for group in groups] == ["group", "channel"]
    assert [group["weights"]["group_size"] for group in groups] == [32, None]
    assert groups[1]["targets"] == [f"model.layers.1.mlp.{kind}_proj" for kind in ("down", "gate", "up")]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].shape == (96, 8)
    assert tensors["model.layers.0.mlp.up_proj.weight_shape"].tolist() == [96, 64]


def test_compressed_tensors_name_a_packed_output_head(packed: Any, tmp_path: Path):
    """vLLM's class of it is no `Linear`: without its name it loads the head as floats, and finds none."""
    source = packed("int4@group:32", False)
    export_language_model(source, tmp_path / "out", "compressed-tensors")
    (group,) = config_of(tmp_path / "out")["config_groups"].values()
    assert group["targets"] == ["Linear", "lm_head"] and config_of(tmp_path / "out")["ignore"] == []
    assert import_language_model(tmp_path / "out", tmp_path / "back").layers == 15
    assert torch.equal(logits(load_language_model(tmp_path / "back")[0]), logits(load_language_model(source)[0]))


def test_gptq_names_uneven_layers_and_says_its_version(packed: Any, tmp_path: Path):
    export_language_model(packed("int4@group:32", rules=UNEVEN), tmp_path / "one", "gptq")
    config = config_of(tmp_path / "one")
    assert {key: config[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"
    }  # fmt: skip
    assert config["dynamic"][r"+:^model\.layers\.1\.mlp\.up_proj$"] == {"bits": 8, "group_size": -1}
    assert config["dynamic"][r"-:^model\.layers\.0\.self_attn\.v_proj$"] == {}
    words = load_file(tmp_path / "one" / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert set(words.flatten().tolist()) == {0x77777777}
    import_language_model(tmp_path / "one", tmp_path / "back")
    want, got = weights_of(packed("int4@group:32", rules=UNEVEN)), weights_of(tmp_path / "back")
    assert all(torch.equal(got[name], want[name]) for name in want)
    export_language_model(packed("int4@group:32:asym"), tmp_path / "two", "gptq")
    assert (config_of(tmp_path / "two")["checkpoint_format"], config_of(tmp_path / "two")["sym"]) == ("gptq_v2", False)


def test_awq_lists_what_stays_float(packed: Any, tmp_path: Path):
    export_language_model(packed("int4@group:32", rules=[("re:.*v_proj", None)]), tmp_path / "out", "awq")
    floats = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    assert config_of(tmp_path / "out") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": floats,
    }  # fmt: skip


def test_embeddings_and_what_is_tied_to_them_become_floats(packed: Any, tmp_path: Path):
    source = packed("int4@group:32", embeddings="int8@group:32")
    done = export_language_model(source, tmp_path / "out", "compressed-tensors")
    assert (done.layers, done.floats) == (14, ("model.embed_tokens",))
    import_language_model(tmp_path / "out", tmp_path / "back")
    model, _ = load_language_model(tmp_path / "back")
    assert not isinstance(model.lm_head, Packed)
    check_same_head(model, load_language_model(source)[0])


def check_same_head(model: Any, want: Any) -> None:
    """A head of floats has the weight that a packed one stands for; its product may add in another order."""
    assert torch.equal(model.lm_head.weight, want.lm_head.weight)
    assert relative_rms(logits(model), logits(want)) < 1e-6


def test_only_compressed_tensors_keep_a_packed_head(packed: Any, tmp_path: Path):
    source = packed("int4@group:32", tied=False)
    assert export_language_model(source, tmp_path / "ct", "compressed-tensors").floats == ()
    assert export_language_model(source, tmp_path / "gptq", "gptq").floats == ("lm_head",)
    for folder in ("ct", "gptq"):
        import_language_model(tmp_path / folder, tmp_path / f"{folder}-back")
        model, _ = load_language_model(tmp_path / f"{folder}-back")
        assert isinstance(model.lm_head, Packed) == (folder == "ct")
        check_same_head(model, load_language_model(source)[0])


def test_shards_are_read_and_written(packed: Any, tmp_path: Path):
    export_language_model(packed("int4@group:32:asym"), tmp_path / "out", "gptq", shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    import_language_model(tmp_path / "out", tmp_path / "back", shard_bytes=10_000)
    assert len(config_of(tmp_path / "back")["files"]) > 3
    want, got = weights_of(packed("int4@group:32:asym")), weights_of(tmp_path / "back")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_transformers_loads_the_same_weights(packed: Any, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")
    from transformers import AutoModelForCausalLM

    rules = [("model.layers.1.mlp", "int8@group:32"), ("re:.*v_proj", None)]
    source = packed("int2@channel", tied=False, rules=rules)
    export_language_model(source, tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    got = logits(model)  # the first forward decompresses
    for name, want in weights_of(source).items():
        assert torch.equal(model.get_submodule(name).weight, want), name
    assert torch.allclose(got, logits(load_language_model(source)[0]), rtol=1e-5, atol=1e-6)


def test_compressed_tensors_reads_the_config_and_zero_points(packed: Any, tmp_path: Path):
    # layer by layer: Transformers 5.23 gives packed zero points the shape of unpacked ones, and fails
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = packed("int4@group:32:asym")
    export_language_model(source, tmp_path / "out", "compressed-tensors")
    scheme = QuantizationConfig.model_validate(config_of(tmp_path / "out")).config_groups["group_0"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, want in weights_of(source).items():
        parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        assert "weight_zero_point" in parts
        got = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(got, want.to(got.dtype)), name  # the library multiplies in the dtype of the scales


def spoiled(folder: Path, target: Path, change: Any) -> Path:
    """A copy with a changed quantization_config, or tensors if `change` takes those."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    tensors = load_file(target / "model.safetensors")
    change(config["quantization_config"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


UP = "model.layers.0.mlp.up_proj"
REFUSED = {
    "act-order": (
        "gptq",
        lambda c, t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0).contiguous()}),
        f"{UP} must have its groups in order.*desc_act=False",
    ),
    "3 bits": ("gptq", lambda c, t: c.update(bits=3), "bits must be one of"),
    "no bits": ("gptq", lambda c, t: c.pop("bits"), "bits must be int, got None"),
    "another gptq": ("gptq", lambda c, t: c.update(checkpoint_format="marlin"), "checkpoint_format must be one of"),
    "a gemv": ("awq", lambda c, t: c.update(version="gemv"), "version 'gemm', got 4 and 'gemv'"),
    "activations": (
        "compressed-tensors",
        lambda c, t: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "must have format pack-quantized, .* and float activations, got .* quantized ones",
    ),
    "no target": (
        "compressed-tensors",
        lambda c, t: c["config_groups"]["group_0"].update(targets=["lm_head"]),
        "a config group must name model.layers.0",
    ),
    "a part missing": ("awq", lambda c, t: t.pop(f"{UP}.scales"), f"{UP} must have .*scales"),
    "a layer that the model has not": (
        "awq",
        lambda c, t: t.update({f"extra.{part}": t[f"{UP}.{part}"].clone() for part in ("qweight", "qzeros", "scales")}),
        "extra must be a linear layer of the model",
    ),
    "another method": ("awq", lambda c, t: c.update(quant_method="bitnet"), "got 'bitnet'; for a float model use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(case: str, packed: Any, tmp_path: Path):
    to, change, words = REFUSED[case]
    export_language_model(packed("int4@group:32"), tmp_path / "out", to)
    with pytest.raises(ValueError, match=words):
        import_language_model(spoiled(tmp_path / "out", tmp_path / "wrong", change), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_bias_of_zeros_that_the_model_has_not_is_left_out(packed: Any, tmp_path: Path):
    export_language_model(packed("int4@group:32"), tmp_path / "out", "gptq")
    wrong = spoiled(tmp_path / "out", tmp_path / "biased", lambda c, t: t.update({f"{UP}.bias": torch.zeros(96)}))
    import_language_model(wrong, tmp_path / "back")
    assert logits(load_language_model(tmp_path / "back")[0]).isfinite().all()


@pytest.mark.parametrize(
    ("to", "weights", "words"),
    [
        ("compressed-tensors", "int1@group:32", r"must be integers in 0\.\.1, got 0\.5"),
        ("awq", "int8@group:32", "must have 4 bits, got 8"),
        ("awq", "mixed", "must have one group size, got .* and .* in model"),
        ("gguf", "int4@group:32", "to must be one of compressed-tensors, gptq, awq, mxfp4, got 'gguf'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(to: str, weights: str, words: str, packed: Any, tmp_path: Path):
    mixed = [("model.layers.1.mlp", "int4@channel")]
    source = packed("int4@group:32", rules=mixed) if weights == "mixed" else packed(weights)
    with pytest.raises(ValueError, match=words):
        export_language_model(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_found_before_anything_is_exported_or_loaded(packed: Any, tmp_path: Path):
    folder = spoiled(packed("int4@group:32"), tmp_path / "wrong", lambda c, t: None)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    for attempt in (load_language_model, lambda path: export_language_model(path, tmp_path / "out", "awq")):
        with pytest.raises(ValueError, match=r"model\.safetensors must have SHA-256 .*the file is damaged"):
            attempt(folder)
    assert load_language_model(folder, verify=False)[0] is not None


def test_the_commands_export_and_import(packed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = packed("int4@group:32", tied=False)
    assert run(["export", str(source), str(tmp_path / "out"), "--to", "awq"]) == 0
    assert "14 packed layers" in (said := capsys.readouterr().out)
    assert "now float: lm_head" in said
    assert run(["generate", str(tmp_path / "out"), "in the"]) == 2
    assert "got 'awq'; convert it with golden-stick import" in capsys.readouterr().err
    assert run(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert run(["generate", str(tmp_path / "back"), "in the", "--max-new-tokens", "2"]) == 0
    assert run(["export", str(source), str(tmp_path / "x"), "--to", "exe"]) == 2
    assert "--to must be one of compressed-tensors, gptq, awq, mxfp4, pt2, onnx, got 'exe'" in capsys.readouterr().err


def test_a_packed_folder_with_holes_is_not_exported(packed: Any, tmp_path: Path):
    def holed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config.pop("files")
        del tensors["model.norm.weight"]

    folder = spoiled(packed("int4@group:32"), tmp_path / "holed", holed)
    with pytest.raises(ValueError, match=r"must hold model\.norm\.weight"):
        export_language_model(folder, tmp_path / "out", "awq")
