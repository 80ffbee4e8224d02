"""`golden-stick quantize` with a calibration text: from a float folder to a packed one."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from gs_algos.cli.app import run
from gs_algos.llm import calibrate
from gs_algos.llm import calibration_text as calibration_text_module
from gs_algos.llm.calibration_text import calibration_text, read_text, windows_of
from gs_algos.llm.load import load_language_model
from gs_algos.ptq import block_loop, ptq
from gs_algos.ptq.config import PTQConfig
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedLinear
from tests.helpers import small_disk
from tests.nets.language_models import WORDS, logits, save_folder, tiny_llama, tiny_tokenizer

OPTIONS = ("--weights", "int4@group:16", "--context", "16", "--samples", "6")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("float") / "model", tiny_llama())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (200,), generator=generator)))
    return path


def test_a_calibrated_folder_is_loaded_and_said_what_it_is(source, text, tmp_path, capsys):
    target = tmp_path / "packed"
    assert run(["quantize", str(source), str(target), *OPTIONS, "--calibration", str(text), "--act", "int8@token"]) == 0
    told = capsys.readouterr().out
    assert "error / nearest" in told and "model.layers.1.mlp.down_proj" in told
    assert "perplexity behind the calibration text" in told and f"96 tokens of {text}" in told
    model, _ = load_language_model(target)
    assert isinstance(model.model.layers[0].mlp.up_proj, DynamicPackedLinear)
    want, _ = load_language_model(source)
    assert float((logits(model) - logits(want)).square().mean() / logits(want).square().mean()) < 0.05
    assert not (tmp_path / "packed.journal").exists()


def stopped():
    """Returns a `solve` that fails at the ninth layer."""
    solve, calls = block_loop.solve, []

    def until(*args, **more):
        calls.append(args)
        if len(calls) == 9:
            raise RuntimeError("stopped here")
        return solve(*args, **more)

    return until


def test_a_stopped_calibration_goes_on_and_writes_the_same_bytes(source, text, tmp_path, capsys, monkeypatch):
    arguments = ("quantize", str(source))
    options = (*OPTIONS, "--calibration", str(text))
    assert run([*arguments, str(tmp_path / "whole"), *options]) == 0
    target = str(tmp_path / "packed")
    monkeypatch.setattr(block_loop, "solve", stopped())
    assert run([*arguments, target, *options]) == 2
    assert not Path(target).exists() and (tmp_path / "packed.journal").is_dir()
    capsys.readouterr()
    assert run([*arguments, target, *options]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run([*arguments, target, *options, "--resume"]) == 0
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (Path(target) / file.name).read_bytes(), file.name


def test_transforms_are_asked_for_with_commas_and_the_norms_are_written(source, text, tmp_path, capsys):
    target = tmp_path / "packed"
    arguments = ["quantize", str(source), str(target), *OPTIONS, "--calibration", str(text)]
    assert run([*arguments, "--transforms", "smooth=0.7,awq"]) == 0
    assert "smooth 0.7, model.layers.1.input_layernorm" in capsys.readouterr().out.replace("*", "1")
    model, _ = load_language_model(target)
    want, _ = load_language_model(source)
    assert not torch.equal(model.model.layers[1].input_layernorm.weight, want.model.layers[1].input_layernorm.weight)
    assert float((logits(model) - logits(want)).square().mean() / logits(want).square().mean()) < 0.05
    assert run([*arguments, "--transforms", "smoothe"]) == 2
    assert "did you mean smooth" in capsys.readouterr().err


def test_a_budget_chooses_bits_layer_by_layer(source, text, tmp_path, capsys):
    target = tmp_path / "packed"
    choices = ("--budget", "4.5 bits", "--choices", "int2@group:16,int4@group:16,int8@channel")
    arguments = ["quantize", str(source), str(target), *OPTIONS, "--calibration", str(text)]
    assert run([*arguments, *choices, "--rule", "lm_head=none"]) == 0
    told = capsys.readouterr().out
    assert "predicted divergence" in told and "rules=[(" in told
    model, _ = load_language_model(target)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len({layer.bits for layer in layers}) > 1
    assert 8 * sum(layer.nbytes for layer in layers) <= 4.5 * sum(math.prod(layer.shape) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_files_give_the_same_bytes(dtype, text, tmp_path, capsys):
    source = save_folder(tmp_path / "model", tiny_llama().to(dtype))
    arguments = ["quantize", str(source)]
    options = [*OPTIONS, "--calibration", str(text)]
    assert run([*arguments, str(tmp_path / "memory"), *options, "--no-offload"]) == 0
    assert "bytes of float weights were in files" not in capsys.readouterr().out
    assert run([*arguments, str(tmp_path / "files"), *options, "--offload"]) == 0
    assert "bytes of float weights were in files" in capsys.readouterr().out
    for file in sorted((tmp_path / "memory").iterdir()):
        assert file.read_bytes() == (tmp_path / "files" / file.name).read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "memory", "model"]


NO_SPACE = "No space left on device"


@pytest.mark.parametrize(
    ("writer", "error", "place"),
    [
        ("modeling_utils.safe_save_file", lambda _: SafetensorError(f"I/O error: {NO_SPACE} (os error 28)"), "packed"),
        ("PreTrainedTokenizerBase.save_pretrained", lambda _: Exception(f"{NO_SPACE} (os error 28)"), "packed"),
        (
            "PreTrainedConfig.save_pretrained",
            lambda folder: OSError(errno.ENOSPC, NO_SPACE, f"{folder}/config.json"),
            "packed/config.json",
        ),
    ],
)
def test_a_full_disk_names_the_place_and_what_was_found_is_not_lost(
    writer, error, place, source, text, tmp_path, capsys, monkeypatch
):
    def full(one, folder, *args, **more):
        raise error(folder)

    arguments = ["quantize", str(source), str(tmp_path / "packed"), *OPTIONS, "--calibration", str(text), "--offload"]
    monkeypatch.setattr(f"transformers.{writer}", full)
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert "Errno 28" in told and f"{NO_SPACE}" in told and f"none is left: '{tmp_path / place}'" in told
    assert [path.name for path in tmp_path.iterdir()] == ["packed.journal"]
    monkeypatch.undo()
    assert run([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_weights_that_find_no_space_in_files_leave_nothing(source, text, tmp_path, capsys):
    arguments = ["quantize", str(source), str(tmp_path / "packed"), *OPTIONS, "--calibration", str(text), "--offload"]
    with small_disk(5000):
        assert run(arguments) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_activations_go_to_files_too_and_few_tokens_show_the_blocks(source, tmp_path, monkeypatch):
    lengths, find = [], ptq.find_blocks

    def found(model, sites, inputs, *args):
        lengths.append(inputs["input_ids"].shape[1])
        return find(model, sites, inputs, *args)

    monkeypatch.setattr(ptq, "find_blocks", found)
    config = PTQConfig(weight="int4@group:16", blocks="re:model.layers.[0-9]+")
    result = calibrate.calibrate_language_model(source, tmp_path / "packed", config, context=48, offload=True)
    assert result.report.in_memory == 0 and result.report.on_disk > 0
    assert lengths and set(lengths) == {32}


def test_weights_go_to_files_where_memory_is_short(source, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "free_memory", lambda: 1000)
    assert run(["quantize", str(source), str(tmp_path / "packed"), *OPTIONS, "--calibration", str(text)]) == 0
    assert "bytes of float weights were in files" in capsys.readouterr().out


def test_choices_without_a_budget_are_refused(source, text, tmp_path, capsys):
    arguments = ["quantize", str(source), str(tmp_path / "packed"), *OPTIONS, "--calibration", str(text)]
    assert run([*arguments, "--choices", "int2@channel,int4@channel"]) == 2
    assert "--choices needs --budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--choices", "int2@channel"), ("--offload",), ("--samples", "3"), ("--context", "16")]
)
def test_options_of_a_calibration_without_one_are_refused(source, tmp_path, capsys, option):
    assert run(["quantize", str(source), str(tmp_path / "packed"), "--weights", "int4@group:16", *option]) == 2
    assert f"{option[0]} is for a calibration, got none" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_rounding_to_nearest_takes_the_way_without_data(source, tmp_path, capsys):
    assert run(["quantize", str(source), str(tmp_path / "packed"), "--weights", "int4@group:16"]) == 0
    assert "error / nearest" not in capsys.readouterr().out


def test_the_built_in_text_serves_and_is_named(source, tmp_path, capsys):
    target = str(tmp_path / "packed")
    assert run(["quantize", str(source), target, *OPTIONS, "--rounding", "gptq"]) == 0
    assert "the Python language reference, since no text was given" in capsys.readouterr().out


def test_json_lines_give_their_texts(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n"two"\n\n{"id": 1, "content": "three"}\n')
    assert read_text(path, "quantize")[0] == "one\n\ntwo\n\nthree"
    for line, told in (
        ('{"id": 1}', "must have one of text"),
        ("{", "a JSON object in each line"),
        ("[" * 100_000, "a JSON object in each line"),
    ):
        path.write_text(f'"a"\n{line}\n')
        with pytest.raises(ValueError, match=rf"{told}.*line 2"):
            read_text(path, "quantize")


def test_json_lines_may_hold_any_character_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('\ufeff{"text": "one\u2028two\x85three"}\r\n"four"\r\n', encoding="utf-8", newline="")
    assert read_text(path, "quantize")[0] == "one\u2028two\x85three\n\nfour"


def test_a_text_gives_a_part_to_the_measurement(text):
    tokens = tiny_tokenizer()(text.read_text(), return_tensors="pt").input_ids.shape[1]
    cut = calibration_text(text, tiny_tokenizer(), 1000, 16, 64, "quantize")
    assert cut.tokens % 16 == 0 and cut.tokens <= 0.9 * tokens and 0 < len(cut.rest) <= 64
    assert calibration_text(text, tiny_tokenizer(), 2, 16, 64, "quantize").tokens == 32


def test_the_measured_part_begins_as_the_tokenizer_begins_a_text(text):
    plain = calibration_text(text, tiny_tokenizer(), 2, 16, 32, "quantize").rest
    begun = calibration_text(text, beginning_tokenizer(), 2, 16, 32, "quantize")
    assert begun.windows[0][0, 0] == 1 and begun.rest[0] == 1 and len(begun.rest) == 32
    assert torch.equal(begun.rest[3:], plain[:29])  # each window gave the place of a token to <s>


def beginning_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_every_window_begins_as_the_tokenizer_begins_a_text(text):
    ids = tiny_tokenizer()(text.read_text(), return_tensors="pt").input_ids[0]
    begun = calibration_text(text, beginning_tokenizer(), 3, 16, 32, "quantize")
    assert [window.shape for window in begun.windows] == [(1, 16)] * 3 and begun.tokens == 48
    for number, window in enumerate(begun.windows):
        assert window[0].tolist() == [1, *ids[15 * number : 15 * (number + 1)].tolist()]
    assert torch.equal(begun.rest, torch.cat((torch.tensor([1]), ids[45 : 45 + 31])))


def test_windows_of_a_tokenizer_that_begins_no_text_are_its_tokens_cut_up(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    assert torch.equal(torch.cat(windows_of(tokenizer, ids, 16), 1)[0], ids[: len(ids) // 16 * 16])
    assert windows_of(tokenizer, ids[:15], 16) == [] and windows_of(tokenizer, ids[:0], 16) == []


def test_a_journal_of_windows_without_the_beginning_is_refused(text, tmp_path, capsys, monkeypatch):
    source = save_folder(tmp_path / "model", tiny_llama())
    beginning_tokenizer().save_pretrained(source)
    arguments = ["quantize", str(source), str(tmp_path / "packed"), *OPTIONS, "--calibration", str(text)]

    def cut_up(tokenizer, ids, context):
        return [window[None] for window in ids.split(context) if len(window) == context]

    with monkeypatch.context() as patch:
        patch.setattr(block_loop, "solve", stopped())
        patch.setattr(calibration_text_module, "windows_of", cut_up)
        assert run(arguments) == 2
    capsys.readouterr()
    assert run([*arguments, "--resume"]) == 2
    assert "the journal must be of this model, these options and this data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--calibration", "nothing.txt"), "must be a file, got nothing.txt"),
        (("--rounding", "gtpq"), "rounding must be one of"),
        (("--act", "int4"), "act must look like"),
        (("--act", "int8@tensor"), "act must be None or 'int8@token', got 'int8@tensor"),
        (("--context", "1", "--rounding", "gptq"), "context must be at least 2"),
        (("--context", "0", "--rounding", "gptq"), "context must be at least 2, got 0"),
        (("--context", "65", "--rounding", "gptq"), "context must be at most the 64 positions of the model, got 65"),
        (("--samples", "0", "--rounding", "gptq"), "samples must be at least 1"),
        (("--weights", "int4@group:7", "--rounding", "gptq"), "the group must divide"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(source, tmp_path, capsys, arguments, told):
    target = tmp_path / "packed"
    assert run(["quantize", str(source), str(target), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error
    assert not target.exists()


@pytest.mark.parametrize("way", [(), ("--rounding", "gptq")])
def test_a_target_without_a_name_of_its_own_is_refused(source, tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", "/"):
        assert run(["quantize", str(source), place, "--weights", "int4@group:16", *way]) == 2
        assert "must have a name of its own" in capsys.readouterr().err


def test_a_text_that_fills_no_window_is_refused(source, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the light")
    arguments = ["--context", "64", "--calibration", str(tmp_path / "short.txt")]
    assert run(["quantize", str(source), str(tmp_path / "packed"), "--weights", "int4@group:16", *arguments]) == 2
    assert "must fill a window of 64 tokens, got 2 in" in capsys.readouterr().err


def test_a_quantized_source_is_refused(source, text, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert run(["quantize", str(source), str(packed), "--weights", "int4@group:16"]) == 0
    assert run(["quantize", str(packed), str(tmp_path / "again"), "--rounding", "gptq"]) == 2
    assert "must be a float model" in capsys.readouterr().err


def test_exports_refuse_layers_that_round_what_they_read(source, text, tmp_path, capsys):
    packed = tmp_path / "packed"
    run(["quantize", str(source), str(packed), *OPTIONS, "--calibration", str(text), "--act", "int8@token"])
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert set(config["acts"].values()) == {"int8@token"}
    capsys.readouterr()
    assert run(["export", str(packed), str(tmp_path / "out"), "--to", "gptq"]) == 2
    assert "must read floats" in capsys.readouterr().err


def test_a_rotated_folder_says_the_same_after_loading_and_is_not_exported(source, text, tmp_path, capsys):
    packed = tmp_path / "packed"
    options = ("--calibration", str(text), "--rounding", "nearest", "--transforms", "rotate", "--offload")
    assert run(["quantize", str(source), str(packed), *OPTIONS, *options]) == 0
    assert "rotated behind model.embed_tokens as it runs, back before model.norm" in capsys.readouterr().out
    want, _ = load_language_model(source)
    model, _ = load_language_model(packed)
    assert float((logits(model) - logits(want)).square().mean() / logits(want).square().mean()) < 0.05
    assert run(["export", str(packed), str(tmp_path / "out"), "--to", "gptq"]) == 2
    assert "model.embed_tokens and 3 more that are rotated as they run" in capsys.readouterr().err


def test_calibrated_weights_are_exported_as_they_are(source, text, tmp_path):
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert run(["quantize", str(source), str(packed), *OPTIONS, "--calibration", str(text)]) == 0
    assert run(["export", str(packed), str(out), "--to", "compressed-tensors"]) == 0
    assert run(["import", str(out), str(tmp_path / "back")]) == 0
    first, back = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "back"))
    for name in (key for key in first if key.endswith("codes")):
        torch.testing.assert_close(back[name], first[name], rtol=0, atol=0)


def test_the_function_reads_a_few_windows_of_the_built_in_text(source, tmp_path):
    config = PTQConfig(weight="int4@group:16")
    done = calibrate.calibrate_language_model(source, tmp_path / "packed", config, samples=2, context=16)
    assert done.tokens == 32 and done.after is not None and "few" in " ".join(done.notes)
