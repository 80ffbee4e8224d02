"""`golden-stick quantize`, `generate` and `perplexity` on a tiny Llama: folders, GGUF, and ways to get it wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gs_algos import PackedEmbedding, PackedLinear, quantize_weights
from gs_algos.cli.app import run
from gs_algos.cli.language import parse_rules
from gs_algos.llm import quantize_checkpoint as checkpoint
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.quant.packed.module import Packed
from tests.helpers import relative_rms, same_bits
from tests.nets.language_models import WORDS, logits, save_folder, save_gguf, tiny_llama

TEXT = " ".join(WORDS * 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float folder whose head is tied to its embedding."""
    return save_folder(tmp_path_factory.mktemp("float") / "model", tiny_llama())


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    """The same, its linears in 4 bits and its embedding in 8."""
    target = source.parent / "packed"
    rules = [("model.layers.1.mlp", "int8@channel"), ("re:.*v_proj", None)]
    quantize_checkpoint(source, target, "int4@group:32:asym", embeddings="int8@group:32", rules=rules, progress=False)
    return target


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command fails with."""
    capsys.readouterr()
    assert run(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a folder with a changed config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_packed_folder_loads_as_the_model_packed_in_memory(packed: Path):
    model, tokenizer = load_language_model(packed)
    want = tiny_llama()
    rules = [("model.layers.1.mlp", "int8@channel"), ("re:.*v_proj", None)]
    quantize_weights(want, "int4@group:32:asym", embeddings="int8@group:32", rules=rules)
    assert same_bits(logits(model), logits(want))
    assert {name: t.dtype for name, t in model.state_dict().items()} == {
        name: t.dtype for name, t in want.state_dict().items()
    }
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.packed.codes is model.model.embed_tokens.codes
    assert tokenizer("in the beginning").input_ids == [3, 4, 5]


def test_the_folder_is_as_its_description_says(packed: Path):
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"]) == ("golden-stick", 1)
    assert config["tied"] == {"lm_head": "model.embed_tokens"}
    assert config["layers"]["model.layers.1.mlp.up_proj"] == {
        "bits": 8, "shape": [96, 64], "group_size": 64, "zero": 128.0, "scale_dtype": "float16", "levels": False
    }  # fmt: skip
    tensors = load_file(packed / "model.safetensors")
    names = {name.rpartition(".")[2] for name in tensors if name.startswith("model.layers.0.self_attn.q_proj")}
    assert names == {"codes", "scale", "zero"}
    assert tensors["model.layers.0.self_attn.q_proj.codes"].shape == (64, 32)
    assert "model.layers.0.self_attn.v_proj.weight" in tensors
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in packed.iterdir()}


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_every_width_comes_back_from_disk(source: Path, tmp_path: Path, bits: int):
    quantize_checkpoint(source, tmp_path / "out", f"int{bits}@group:32", progress=False)
    want = quantize_weights(tiny_llama(), f"int{bits}@group:32")
    assert same_bits(logits(load_language_model(tmp_path / "out")[0]), logits(want))


def test_shards_in_and_out_give_the_same_model(tmp_path: Path, packed: Path):
    sharded = save_folder(tmp_path / "sharded", tiny_llama(), max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    rules = [("model.layers.1.mlp", "int8@channel"), ("re:.*v_proj", None)]
    options: dict[str, Any] = {"embeddings": "int8@group:32", "rules": rules, "progress": False}
    quantize_checkpoint(sharded, tmp_path / "out", "int4@group:32:asym", shard_bytes=10_000, **options)
    shards = list((tmp_path / "out").glob("model-0000*-of-*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 20_000
    assert same_bits(logits(load_language_model(tmp_path / "out")[0]), logits(load_language_model(packed)[0]))


def test_what_stays_float_can_be_cast(source: Path, tmp_path: Path):
    quantize_checkpoint(source, tmp_path / "out", "int8@group:32", dtype=torch.bfloat16, progress=False)
    model, _ = load_language_model(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.scale.dtype for m in model.modules() if isinstance(m, Packed)} == {torch.float16}
    assert relative_rms(logits(model), logits(tiny_llama())) < 0.1
    assert load_language_model(tmp_path / "out", dtype=torch.float32)[0].model.norm.weight.dtype == torch.float32


def test_a_gguf_file_is_packed_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("gguf", reason="the package gguf reads GGUF files")
    path = save_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, tokenizer = load_language_model(path)
    assert relative_rms(logits(model), logits(tiny_llama())) < 0.05
    assert tokenizer.decode([3, 4, 5]) == "in the beginning"
    assert run(["quantize", str(path), str(tmp_path / "out"), "--weights", "int8@group:32"]) == 0
    assert "14 weights packed, 1 kept float" in capsys.readouterr().out
    assert relative_rms(logits(load_language_model(tmp_path / "out")[0]), logits(model)) < 0.05


def test_the_commands_pack_measure_and_continue(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    options = ["--weights", "int8@group:32", "--embeddings", "int8@group:32", "--rule", "lm_head=int4@group:32"]
    assert run(["quantize", str(source), str(out), *options, "--rule", "re:.*down_proj=none"]) == 0
    assert "13 weights packed, 2 kept float" in capsys.readouterr().out
    assert load_language_model(out)[0].lm_head.bits == 4
    values = {}
    for folder in (source, out):
        assert run(["perplexity", str(folder), "--text", str(text), "--context", "32", "--max-tokens", "100"]) == 0
        said = capsys.readouterr().out
        assert "over 93 tokens" in said
        assert "(3 windows of 32)" in said
        values[folder] = float(said.split()[1])
    assert values[out] == pytest.approx(values[source], rel=0.5)
    assert run(["generate", str(out), "in the beginning", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("in the beginning")
    assert "5 tokens, the first after" in captured.err
    assert "tokens/s" in captured.err
    assert run(["generate", str(out), "in the", "--max-new-tokens", "3", "--temperature", "2", "--seed", "5"]) == 0


def test_rules_are_read_from_text():
    assert parse_rules(["lm_head=int8@group:64:percentile=99", "re:.*(?=x)y=none", "a=b=uint4@channel:asym"]) == [
        ("lm_head", "int8@group:64:percentile=99"), ("re:.*(?=x)y", None), ("a=b", "uint4@channel:asym")
    ]  # fmt: skip
    assert parse_rules(["re:.*experts.*=mxfp4", "a=nvfp4:mse"]) == [("re:.*experts.*", "mxfp4"), ("a", "nvfp4:mse")]


def write_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


WRONG_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no safetensors": (
        lambda f: (f / "model.safetensors").unlink(),
        "must hold model.safetensors or .*save_pretrained",
    ),
    "truncated": (write_truncated, "must be a whole safetensors file"),
    "no config": (lambda f: (f / "config.json").unlink(), "must be a Transformers folder with a config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config is cut": (lambda f: (f / "config.json").write_text("{"), "must be JSON"),
    "an index without files": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors must be there",
    ),
    "an index that leads elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "must have a weight_map of file names",
    ),
}


@pytest.mark.parametrize("case", WRONG_SOURCES)
@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_a_broken_folder_is_refused_in_one_line(
    case: str, command: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil, words = WRONG_SOURCES[case]
    folder = edited(source, tmp_path / "broken", lambda config: None)
    spoil(folder)
    target = str(tmp_path / "out") if command == "quantize" else "hello"
    line = refused(capsys, command, str(folder), target)
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def with_entry(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"].update({name: value})


WRONG_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another library": (with_entry("quant_method", "gptq"), "quant_method must be 'golden-stick', got 'gptq'"),
    "of a newer version": (with_entry("version", 2), "version must be at most 1, got 2; update golden-stick"),
    "an unknown field": (
        with_entry("rotation", "hadamard"),
        "fields must be of .*, got 'rotation'; update golden-stick",
    ),
    "a file that is not there": (
        with_entry("files", {"model-2.safetensors": "0"}),
        "model-2.safetensors must be there",
    ),
    "a file elsewhere": (with_entry("files", {"../model.safetensors": "0"}), "files must map file names to SHA-256"),
    "no layers": (with_entry("layers", {}), "layers and tied must be objects"),
    "unknown bits": (
        lambda c: c["quantization_config"]["layers"]["model.embed_tokens"].update(bits=3),
        "model.embed_tokens must be the format of a packed weight",
    ),
    "another shape": (
        lambda c: c["quantization_config"]["layers"]["model.embed_tokens"].update(shape=[32, 96]),
        r"model.embed_tokens.codes must be \[32, 96\].*got \[32, 64\]",
    ),
    "tied to nothing": (with_entry("tied", {"lm_head": "model.norm"}), "lm_head must be tied to a packed layer"),
    "a layer more than its tensors": (
        lambda c: c["quantization_config"]["layers"].pop("model.layers.0.self_attn.q_proj"),
        "must hold every tensor.*q_proj",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_description_is_refused_in_one_line(
    case: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    change, words = WRONG_CONFIGS[case]
    line = refused(capsys, "generate", str(edited(packed, tmp_path / "wrong", change)), "hello")
    assert re.search(words, line), line


@pytest.mark.parametrize("spoil", ["missing", "shorter", "nan"])
def test_wrong_packed_tensors_are_refused_by_name(
    spoil: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = edited(packed, tmp_path / "wrong", lambda config: config["quantization_config"].pop("files"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj." + ("codes" if spoil == "shorter" else "scale")
    if spoil == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous() if spoil == "shorter" else tensors[name] * float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert name in refused(capsys, "generate", str(folder), "hello")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "TMP/none", "TMP/out"], "must be a Transformers folder or a GGUF file, got nothing there"),
        (["quantize", "TEXT", "TMP/out"], "got a file that starts b'in t'"),
        (["quantize", "SOURCE", "SOURCE"], "must be new or an empty folder"),
        (["quantize", "PACKED", "TMP/out"], "must be a float model, got one with quant_method 'golden-stick'"),
        (
            ["quantize", "SOURCE", "TMP/out", "--weights", "int4@group:128"],
            "the group must divide the 64 inputs of model.layers.0.self_attn.q_proj",
        ),
        (["quantize", "SOURCE", "TMP/out", "--weights", "int3@channel"], "bits must be one of 1, 2, 4, 8"),
        (["quantize", "SOURCE", "TMP/out", "--weights", "int4"], "Scheme: weight must"),
        (["quantize", "SOURCE", "TMP/out", "--rule", "lm_head"], "--rule must be PATTERN=SCHEME"),
        (["quantize", "SOURCE", "TMP/out", "--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16"),
        (["perplexity", "PACKED", "--text", "TMP/none"], "--text must be a file"),
        (["perplexity", "PACKED", "--text", "TEXT", "--context", "1024"], "context must be in 2..64, got 1024"),
        (["perplexity", "PACKED", "--text", "TEXT", "--max-tokens", "8"], "must fill a window of 64 tokens, got 8"),
        (
            ["perplexity", "PACKED", "--text", "TEXT", "--max-tokens", "8", "--context", "16"],
            "the text must fill a window of 16 tokens, got 8",
        ),
        (
            ["perplexity", "PACKED", "--text", "TEXT", "--context", "16", "--stride", "17"],
            "stride must be in 1..16",
        ),
        (["generate", "PACKED", ""], "the prompt must have at least one token"),
        (["generate", "PACKED", "x", "--max-new-tokens", "0"], "--max-new-tokens must be >= 1"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    words: str,
    source: Path,
    packed: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    places = {
        "SOURCE": source,
        "PACKED": packed,
        "TEXT": text,
        "TMP/none": tmp_path / "none",
        "TMP/out": tmp_path / "out",
    }
    line = refused(capsys, *(str(places.get(argument, argument)) for argument in arguments))
    assert words in line, line
    assert not (tmp_path / "out").exists()


def test_tensors_under_other_names_than_the_model_s_are_refused(source: Path, tmp_path: Path):
    folder = edited(source, tmp_path / "renamed", lambda config: None)
    tensors = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold model\.layers\.0\.\S+\.weight.*14 such layers.*save_pretrained"):
        quantize_checkpoint(folder, tmp_path / "out", "int4@channel", progress=False)


def test_a_run_that_is_stopped_leaves_nothing_and_can_be_run_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "part-0.safetensors").write_text("of a run that was killed")
    calls: list[int] = []

    def stopped(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = checkpoint.rounded
    monkeypatch.setattr(checkpoint, "rounded", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, target, "int4@channel", progress=False)
    assert list(tmp_path.iterdir()) == []
    quantize_checkpoint(source, target, "int4@channel", progress=False)
    assert "part-0.safetensors" not in [file.name for file in target.iterdir()]


def test_a_missing_library_is_named(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capsys, "generate", str(source), "hello")
    assert "needs the packages transformers, got no transformers; pip install 'golden-stick-triton[hf]'" in line


class Bigram(nn.Module):
    """The next token depends on the last one only, so that windows make no difference but to which tokens count."""

    def __init__(self, vocabulary: int = 7) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


@pytest.mark.parametrize(
    ("context", "stride", "predicted"),
    [
        (4, None, [1, 2, 3, 5, 6, 7]),
        (4, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (5, 3, [1, 2, 3, 4, 5, 6, 7]),
        (10, None, list(range(1, 10))),
    ],
)
def test_perplexity_counts_each_predicted_token_once(context: int, stride: int | None, predicted: list[int]):
    ids = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]
    model = Bigram()
    log_p = model.table.log_softmax(1).tolist()
    mean = -sum(log_p[ids[i - 1]][ids[i]] for i in predicted) / len(predicted)
    result = perplexity(model, torch.tensor(ids), context, stride)
    assert result.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.tokens == len(predicted)


class Positions:
    """A config of Transformers that knows how many positions there are."""

    def __init__(self, count: object) -> None:
        self.max_position_embeddings = count


@pytest.mark.parametrize(("count", "context"), [(None, 1024), (6, 6), (5000, 1024), (1024, 1024)])
def test_a_window_is_as_long_as_the_model_can_read_if_nobody_says(count: int | None, context: int):
    model = Bigram()
    if count is not None:
        model.config = Positions(count)  # type: ignore[assignment]
    result = perplexity(model, torch.arange(1030) % 7)
    assert (result.context, result.windows) == (context, 1030 // context)
    model.config = Positions(6)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"perplexity: context must be in 2\.\.6, got 7"):
        perplexity(model, torch.arange(1030) % 7, 7)


def test_perplexity_of_nan_is_refused():
    model = Bigram()
    model.table.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="must give probabilities, got NaN"):
        perplexity(model, torch.zeros(8, dtype=torch.long), 4)
