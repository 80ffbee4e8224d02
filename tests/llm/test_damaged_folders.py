"""Folders that name code, or whose settings, tokenizer or index are damaged: one ValueError with the file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gs_algos.cli.app import run
from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    made = {name: base / name for name in ("float", "packed", "gptq", "sharded")}
    save_folder(made["float"], tiny_llama(False))
    save_folder(made["sharded"], tiny_llama(False), max_shard_size="40KB")
    quantize_checkpoint(made["float"], made["packed"], "int4@group:32", progress=False)
    export_language_model(made["packed"], made["gptq"], "gptq")
    return made


READERS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "load": ("packed", lambda folder, out: load_language_model(folder)),
    "load of floats": ("float", lambda folder, out: load_language_model(folder)),
    "quantize": ("float", lambda folder, out: quantize_checkpoint(folder, out, "int4@group:32", progress=False)),
    "export": ("packed", lambda folder, out: export_language_model(folder, out, "awq")),
    "import": ("gptq", import_language_model),
}


def refusal(reader: str, folders: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], Any]) -> str:
    """What the reader of a spoiled copy says."""
    source, read = READERS[reader]
    folder = Path(shutil.copytree(folders[source], tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(ValueError, match="got") as error:
        read(folder, tmp_path / "out")
    assert type(error.value) is ValueError
    assert not (tmp_path / "out").exists()
    return str(error.value)


def put(file: str, **entries: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        path = folder / file
        data = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(data | entries))

    return spoil


NAMES_CODE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a model": (put("config.json", model_type="x", auto_map={"AutoConfig": "own.C"}), "config.json"),
    "a model that is known": (put("config.json", auto_map={"AutoModelForCausalLM": "own.M"}), "config.json"),
    "a part": (put("config.json", text_config={"auto_map": {"AutoConfig": "own.C"}}), "config.json"),
    "a tokenizer": (put("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}), "tokenizer_config.json"),
    "a processor": (put("preprocessor_config.json", auto_map={"AutoProcessor": "own.P"}), "preprocessor_config.json"),
    "a kernel": (put("config.json", _attn_implementation="somebody/kernel"), "config.json"),
    "generation": (lambda folder: (folder / "custom_generate").mkdir(), "custom_generate"),
}


@pytest.mark.parametrize("case", NAMES_CODE)
@pytest.mark.parametrize("reader", ["load", "quantize", "export", "import"])
def test_code_in_a_folder_is_refused_and_not_run(
    case: str, reader: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    spoil, file = NAMES_CODE[case]

    def spoiled(folder: Path) -> None:
        spoil(folder)
        code = (
            f"open({str(tmp_path / 'RAN')!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        )
        (folder / "own.py").write_text(code)

    line = refusal(reader, folders, tmp_path, spoiled)
    assert file in line
    assert "code to run" in line
    assert not (tmp_path / "RAN").exists()


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "null": lambda text: "null",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "nested": lambda text: '{"a":' * 50_000 + "1" + "}" * 50_000,
    "another encoding": lambda text: text.encode("utf-16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_named(file: str, damage: str, folders: dict[str, Path], tmp_path: Path):
    def spoil(folder: Path) -> None:
        text = DAMAGES[damage]((folder / file).read_text())
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    assert f"copy/{file}" in refusal("load", folders, tmp_path, spoil)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"content"', '"kontent"'), ('"added_tokens"', '"added_tokenz"'), ('"model"', '"modell"')],
)
def test_a_tokenizer_without_its_parts_is_named(old: str, new: str, folders: dict[str, Path], tmp_path: Path):
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace(old, new, 1))

    assert "tokenizer.json" in refusal("load", folders, tmp_path, spoil)


@pytest.mark.parametrize(
    "entry",
    [
        {"vocab_size": "x"},
        {"hidden_size": 10**18},
        {"vocab_size": 10**15},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**300},
        {"num_labels": 10**9},
        {"num_attention_heads": 0},
        {"hidden_act": "nothing"},
        {"model_type": ["llama"]},
        {"model_type": "vit"},
        {"rope_parameters": {"rope_type": "nothing"}},
        {"dtype": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("reader", ["load", "quantize"])
def test_a_wrong_value_in_the_config_names_the_file(
    entry: dict[str, Any], reader: str, folders: dict[str, Path], tmp_path: Path
):
    assert "config.json" in refusal(reader, folders, tmp_path, put("config.json", **entry))


def drop(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file, {"format": "pt"})


def again(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop, f"as {INDEX} says, got no file that has it"),
        (again, "must be in one file, got it in"),
        (lambda folder: save_file(load_file(next(folder.glob("model-*"))), folder / "model.safetensors"), "got both"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused(
    spoil: Callable[[Path], Any], words: str, folders: dict[str, Path], tmp_path: Path
):
    folder = Path(shutil.copytree(folders["sharded"], tmp_path / "copy"))
    spoil(folder)
    for read in (load_language_model, lambda path: quantize_checkpoint(path, tmp_path / "out", "int8@channel")):
        with pytest.raises(ValueError, match=words):
            read(folder)


def test_weights_under_another_name_are_named(folders: dict[str, Path], tmp_path: Path):
    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit.safetensors")

    assert "got gptq_model-4bit.safetensors; rename it" in refusal("import", folders, tmp_path, rename)


def test_an_adapter_beside_a_model_is_refused(folders: dict[str, Path], tmp_path: Path):
    assert "merge the adapter first" in refusal("load", folders, tmp_path, put("adapter_config.json", peft_type="LORA"))


@pytest.mark.parametrize("command", ["generate", "perplexity"])
def test_commands_say_it_in_one_line(
    command: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(folders["packed"], tmp_path / "copy"))
    put("config.json", auto_map={"AutoConfig": "own.C"})(folder)
    (tmp_path / "text").write_text("in the beginning")
    more = {"generate": ["in the"], "perplexity": ["--text", str(tmp_path / "text")]}[command]
    assert run([command, str(folder), *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "config.json must name no code to run" in lines[0]
