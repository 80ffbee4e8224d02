"""Imported folders: what a config or a tensor's name says is used or refused by name, and no tensor is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

IDS = torch.tensor([[1, 3, 4, 5, 9, 20]])
LAYER = "model.layers.0.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
BIASED = {"attention_bias": True}
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that exports a tiny Llama with an untied head, once for each format and scheme."""
    base = tmp_path_factory.mktemp("foreign")
    made: dict[str, Path] = {}

    def export(to: str, weights: str = "int4@group:32", **options: Any) -> Path:
        key = f"{to}-{weights}-{options}"
        if key not in made:
            made[key] = base / str(len(made))
            model = tiny_llama(False, **options)
            for name, tensor in model.named_parameters():
                if name.endswith(".bias"):
                    tensor.data.normal_()
            save_folder(base / f"float-{key}", model)
            quantize_checkpoint(base / f"float-{key}", base / f"packed-{key}", weights, progress=False)
            export_language_model(base / f"packed-{key}", made[key], to)
        return made[key]

    return export


def changed(folder: Path, target: Path, change: Change) -> Path:
    """A copy with another quantization_config or other tensors."""
    shutil.copytree(folder, target)
    config, tensors = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    change(config["quantization_config"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_language_model(folder)[0](IDS).logits


def imported(folder: Path, tmp_path: Path, change: Change = lambda config, tensors: None) -> torch.Tensor:
    """The logits of what a changed copy is imported as."""
    out = tmp_path / f"imported-{len(list(tmp_path.iterdir()))}"
    import_language_model(changed(folder, out.with_suffix(".source"), change), out)
    return logits(out)


def drop(*ends: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    return change


def put(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Change:
    return lambda config, tensors: tensors.update({name: make(tensors).contiguous()})


def say(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def group(**values: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"].update(values)


def weights(**values: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"]["weights"].update(values)


def both(*changes: Change) -> Change:
    return lambda config, tensors: [change(config, tensors) for change in changes]


CT = "compressed-tensors"
ROTATION = {"config_groups": {"u": {"type": "hadamard", "apply": []}}}
REFUSED: dict[str, tuple[str, Change, str]] = {
    # tensors that are not there
    "no packed layer": ("gptq", drop("1.self_attn.q_proj." + "qweight", "1.self_attn.q_proj.qzeros",
        "1.self_attn.q_proj.scales", "1.self_attn.q_proj.g_idx"), r"layers\.1\.self_attn\.q_proj"),
    "no codes": ("gptq", drop(f"{LAYER}.qweight"), f"{LAYER} must have .*qweight"),
    "no codes in awq": ("awq", drop(f"{LAYER}.qweight"), f"{LAYER} must have .*qweight"),
    "no shape": (CT, drop(f"{LAYER}.weight_shape"), f"{LAYER} must have .*weight_shape"),
    "no norm": ("gptq", drop(NORM), NORM),
    "no embedding": ("awq", drop("embed_tokens.weight"), r"model\.embed_tokens\.weight"),
    "no head": ("gptq", drop("lm_head.weight"), r"lm_head\.weight"),
    "a packed layer that is float": (CT, both(drop(f"{LAYER}.weight_packed", f"{LAYER}.weight_scale",
        f"{LAYER}.weight_shape"), put(f"{LAYER}.weight", lambda t: torch.zeros(96, 64))), f"{LAYER} must be packed as"),
    # tensors that nobody uses
    "a bias": ("gptq", put(f"{LAYER}.bias", lambda t: torch.ones(96)), rf"{LAYER}\.bias too"),
    "a bias of a float layer": ("awq", put("lm_head.bias", lambda t: torch.zeros(32)), r"lm_head\.bias too"),
    "a scale of keys": (CT, put("model.layers.0.self_attn.k_scale", lambda t: torch.ones(1)), "k_scale too"),
    "an order": (CT, put(f"{LAYER}.weight_g_idx", lambda t: torch.arange(64).flip(0) // 32), f"{LAYER}.*weight_g_idx"),
    # shapes and values
    "another norm": ("gptq", put(NORM, lambda t: torch.ones(65)), rf"{NORM} .* must be \[64\] as config.json says"),
    "whole numbers for floats": ("gptq", put(NORM, lambda t: torch.ones(64).int()), f"{NORM} .*got I32"),
    "a narrower layer": ("gptq", lambda c, t: [t.update({f"{LAYER}.{p}": t[f"{LAYER}.{p}"][:, : 32 // f].contiguous()})
        for p, f in (("qweight", 1), ("scales", 1), ("qzeros", 8))], f"{LAYER} must be of shape"),
    "scales of 0": ("gptq", put(f"{LAYER}.scales", lambda t: t[f"{LAYER}.scales"] * 0), f"scales of {LAYER} must not"),
    "one scale of 0": (CT, put(f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"]
        * (torch.arange(96)[:, None] != 7)), f"scales of {LAYER} must not be 0"),
    "a scale of NaN": ("awq", put(f"{LAYER}.scales", lambda t: t[f"{LAYER}.scales"] * float("nan")),
        f"{LAYER}.scale must be finite"),
    "a scale of Inf": (CT, put(f"{LAYER}.weight_scale", lambda t: t[f"{LAYER}.weight_scale"] / 0),
        f"{LAYER}.scale must be finite"),
    # what a config says
    "an unknown key": ("gptq", say(rotation="hadamard"), "got rotation 'hadamard'"),
    "an unknown key of awq": ("awq", say(scaling=2), "got scaling 2"),
    "an adapter": ("gptq", say(adapter={"rank": 8}), "got adapter"),
    "a transform": (CT, say(transform_config=ROTATION), "got transform_config"),
    "quantized keys": (CT, say(kv_cache_scheme={"num_bits": 8}), "got kv_cache_scheme"),
    "sparsity": (CT, say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config must be of format 'dense'"),
    "not compressed": (CT, say(quantization_status="calibration"), "quantization_status must be 'compressed'"),
    "another packing": (CT, both(say(format="int-quantized"), group(format=None)), "got format .int-quantized"),
    "another packing of a group": (CT, group(format="mxfp6-pack-quantized"), "group_0 must have format"),
    "quantized outputs": (CT, group(output_activations={"num_bits": 8}), "float activations"),
    "an unknown key of a group": (CT, group(smooth=True), "group_0: keys must be .* got smooth"),
    "an unknown key of weights": (CT, weights(hadamard=1), "weights of group_0: keys must be .* got hadamard"),
    "floats": (CT, weights(type="float"), "type must be int, got 'float'"),
    "blocks": (CT, weights(strategy="block"), "strategy must be tensor or channel or group, got 'block'"),
    "dynamic": (CT, weights(dynamic=True), "dynamic must be False"),
    "an order without its tensor": (CT, weights(actorder="group"), "actorder 'group' and no weight_g_idx"),
    "another group size": (CT, weights(group_size=64), "must have a scale for every 64 inputs"),
    "channels": (CT, weights(strategy="channel", group_size=None), "must have a scale for every 64 inputs"),
    "zero points that are not there": (CT, weights(symmetric=False), "must have a weight_zero_point"),
    "an ignored layer": (CT, say(ignore=[LAYER]), f"{LAYER} must be float as .* in ignore says"),
    "ignored by pattern": (CT, say(ignore=["re:.*up_proj"]), f"{LAYER} must be float as re:.*up_proj in ignore"),
    "no pattern": (CT, say(ignore=["re:("]), "patterns must be regular expressions"),
    "two groups": (CT, lambda c, t: c["config_groups"].update(group_1={"targets": ["Linear"],
        "weights": {"num_bits": 8, "group_size": 32}}), "must be in one config group, got group_0 and group_1"),
    "a preset": (CT, say(config_groups={"W4A16": ["Linear"]}), "W4A16 must be an object"),
    "sym with other zero points": ("gptq", put(f"{LAYER}.qzeros", lambda t: t[f"{LAYER}.qzeros"] * 0 + 0x55555555),
        f"zero points of {LAYER} must be 8 as sym says"),
    "no sym and zero points of the other version": ("gptq", lambda c, t: [c.pop("sym"), t.update({n: x * 0 - 0x77777778
        for n, x in t.items() if n.endswith("qzeros")})], "sym must say whether zero points are 8"),
    "two versions": ("gptq", say(format="gptq_v2"), "checkpoint_format must be one of gptq, gptq_v2, got 'gptq and"),
    "an order that is lost": ("gptq", both(say(desc_act=True), drop("g_idx")), "must have a g_idx as desc_act says"),
    "a packed head": ("gptq", say(lm_head=True, dynamic={}), "lm_head must be packed as lm_head True says"),
    "other modules": ("gptq", say(modules_in_block_to_quantize=[["self_attn.q_proj"]]), "must be float as modules_in"),
    "a float layer": ("gptq", say(dynamic={f"-:{LAYER}": {}}), f"{LAYER} must be float as dynamic"),
    "an unknown override": ("gptq", say(dynamic={"+:.*up_proj": {"rotation": 1}}), "dynamic .* got rotation"),
    "other words": ("gptq", say(pack_dtype="int16"), "pack_dtype must be 'int32'"),
    "a string for a flag": ("gptq", say(desc_act="no"), "desc_act must be bool, got 'no'"),
    "another group size of gptq": ("gptq", say(group_size=64), "group_size=64"),
    "another group size of awq": ("awq", say(group_size=64), "must have groups of 64 as group_size says, got 32"),
    "no group size of awq": ("awq", lambda c, t: c.pop("group_size"), "group_size must be int"),
    "a gemv": ("awq", say(version="GEMV"), "version 'gemm'"),
    "two formats of awq": ("awq", say(format="marlin"), "version 'gemm', got 4 and 'marlin'"),
    "another packer of awq": ("awq", say(backend="llm-awq"), "got 4 and 'llm-awq'"),
    "a marlin": ("awq", say(version="marlin"), "version 'gemm'"),
    "a layer not converted": ("awq", say(modules_to_not_convert=["up_proj"]), f"{LAYER} must be float as up_proj in"),
    "no zero points": ("awq", both(say(zero_point=False), put(f"{LAYER}.qzeros", lambda t: t[f"{LAYER}.qzeros"] * 0)),
        f"zero points of {LAYER} must be 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name(case: str, foreign: Any, tmp_path: Path):
    to, change, words = REFUSED[case]
    folder = changed(foreign(to), tmp_path / "changed", change)
    with pytest.raises(ValueError, match=words):
        import_language_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HARMLESS: dict[str, tuple[str, Change]] = {
    "notes of gptqmodel": ("gptq", say(meta={"quantizer": ["gptqmodel:5"], "damp_percent": 0.1}, true_sequential=True)),
    "what is switched off": ("gptq", say(rotation=None, adapter=None, is_marlin_format=False, static_groups=False)),
    "notes of awq": ("awq", say(backend="auto", do_fuse=False)),
    "what transformers writes of awq": ("awq", say(sym=True, zero_point=True, desc_act=False, act_group_aware=True,
        meta=None, cache_block_outputs=True, batch_size=1, modules_in_block_to_quantize=None, format="gemm")),
    "what transformers writes of gptq": ("gptq", say(format="gptq", act_group_aware=True, cache_block_outputs=True,
        batch_size=1, modules_in_block_to_quantize=None, dataset=None, tokenizer=None, meta=None)),
    "notes of llm-compressor": (CT, say(version="0.11", sparsity_config={}, transform_config={}, run_compressed=True)),
    "how scales were found": (CT, weights(observer="mse", observer_kwargs={"averaging": 1}, actorder="static")),
    "targets by pattern": (CT, group(targets=["re:.*self_attn.*", "re:.*mlp.*", "lm_head"])),
    "a pattern before a class": (CT, lambda c, t: c["config_groups"].update(group_0={**c["config_groups"]["group_0"],
        "targets": ["re:.*"]}, group_1={"targets": ["Linear"], "weights": {"num_bits": 8}})),
    "an order that changes nothing": (CT, put(f"{LAYER}.weight_g_idx", lambda t: torch.arange(64).int() // 32)),
    "an idle bias": ("gptq", put(f"{LAYER}.bias", lambda t: torch.zeros(96))),
    "what is computed now": ("awq", put("model.layers.0.self_attn.rotary_emb.inv_freq", lambda t: torch.ones(8))),
    "modules that are all": ("gptq", say(modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.k_proj"],
        ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]])),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_says_nothing_of_the_weights_is_passed_over(case: str, foreign: Any, tmp_path: Path):
    to, change = HARMLESS[case]
    assert torch.equal(imported(foreign(to), tmp_path, change), imported(foreign(to), tmp_path))


@pytest.mark.parametrize("named", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_zero_points_are_read_by_their_value(named: str, stored: int, foreign: Any, tmp_path: Path):
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config.update(sym=True, checkpoint_format=named)
        word = int.from_bytes(bytes([stored * 17] * 4), "little", signed=True) if stored < 8 else 0x88888888 - 2**32
        tensors |= {name: torch.full_like(t, word) for name, t in tensors.items() if name.endswith("qzeros")}

    assert torch.equal(imported(foreign("gptq"), tmp_path, change), imported(foreign("gptq"), tmp_path))


def test_other_zero_points_are_read_as_the_version_says(foreign: Any, tmp_path: Path):
    folder = foreign("gptq", "int4@group:32:asym")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    ones = 0x11111111

    def older(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config.update(checkpoint_format="gptq", sym=False)
        tensors |= {name: (t - ones).contiguous() for name, t in tensors.items() if name.endswith("qzeros")}

    assert torch.equal(imported(folder, tmp_path, older), imported(folder, tmp_path))


def test_the_first_pattern_of_dynamic_counts(foreign: Any, tmp_path: Path):
    first = say(dynamic={"+:.*up_proj": {"group_size": 32}, "+:.*": {"bits": 8}, f"-:{LAYER}": {}})
    with pytest.raises(ValueError, match="of 8 bits"):
        import_language_model(changed(foreign("gptq"), tmp_path / "a", first), tmp_path / "out")
    right = say(dynamic={"-:^lm_head$": {}, "+:.*_proj": {"bits": 4}, "+:.*": {"bits": 8}})
    assert torch.equal(imported(foreign("gptq"), tmp_path, right), imported(foreign("gptq"), tmp_path))


@pytest.mark.parametrize("to", ["gptq", "awq", CT])
def test_biases_of_packed_layers_are_kept_and_their_absence_is_named(to: str, foreign: Any, tmp_path: Path):
    folder = foreign(to, **BIASED)
    packed = Path(str(folder.parent / f"packed-{to}-int4@group:32-{BIASED}"))
    want = logits(packed)
    got = imported(folder, tmp_path)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    bare = changed(folder, tmp_path / "bare", drop("layers.0.self_attn.q_proj.bias"))
    with pytest.raises(ValueError, match=r"must hold model\.layers\.0\.self_attn\.q_proj\.bias"):
        import_language_model(bare, tmp_path / "out")


def beside(folder: Path, target: Path, file: str, rename: dict[str, str], keep: bool, **others: Any) -> Path:
    """A copy with its settings in a file beside config.json, or in both."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    settings = config.pop("quantization_config")
    if keep:
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    else:
        (target / "config.json").write_text(json.dumps(config))
    settings.pop("quant_method")
    (target / file).write_text(json.dumps({rename.get(key, key): value for key, value in settings.items()} | others))
    return target


OLD_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
FILES: dict[str, tuple[str, str, dict[str, str]]] = {
    "auto-gptq": ("gptq", "quantize_config.json", {}),
    "auto-awq": ("awq", "quant_config.json", OLD_NAMES),
}


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "in both"])
@pytest.mark.parametrize("case", FILES)
def test_settings_beside_the_config_are_read(case: str, keep: bool, foreign: Any, tmp_path: Path):
    to, file, rename = FILES[case]
    folder = beside(foreign(to), tmp_path / "source", file, rename, keep)
    import_language_model(folder, tmp_path / "out")
    assert not (tmp_path / "out" / file).exists()
    assert torch.equal(logits(tmp_path / "out"), imported(foreign(to), tmp_path))


def test_settings_that_contradict_each_other_are_refused(foreign: Any, tmp_path: Path):
    folder = beside(foreign("gptq"), tmp_path / "a", "quantize_config.json", {}, True, desc_act=True)
    with pytest.raises(ValueError, match=r"desc_act must be the same .*quantize_config\.json.*got False and True"):
        import_language_model(folder, tmp_path / "out")
    folder = beside(foreign("gptq"), tmp_path / "b", "quantize_config.json", {}, False, rotation="hadamard")
    with pytest.raises(ValueError, match=r"quantize_config\.json: keys must be .* got rotation"):
        import_language_model(folder, tmp_path / "out")


def test_the_older_name_of_the_entry_is_read(foreign: Any, tmp_path: Path):
    folder = Path(shutil.copytree(foreign(CT), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    import_language_model(folder, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), imported(foreign(CT), tmp_path))
    config["text_config"] = {"quantization_config": config.pop("compression_config")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have its quantization_config at the top"):
        import_language_model(folder, tmp_path / "out2")


def test_two_tensors_that_the_config_ties_must_be_one(foreign: Any, tmp_path: Path):
    folder = Path(shutil.copytree(foreign("gptq"), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head\.weight .* must be model\.embed_tokens\.weight"):
        import_language_model(folder, tmp_path / "out")
