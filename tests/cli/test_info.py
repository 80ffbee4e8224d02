"""`golden-stick info` on everything that the commands write, and in one line on what is something else."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gs_algos import SimQAT, save
from gs_algos.cli.app import run
from gs_algos.demo.models import build
from gs_algos.export.torch_package import KEY, VERSION
from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_kernels.cpu import library
from gs_kernels.runtime.instructions import instruction_set
from tests.nets.language_models import save_folder, save_gguf, tiny_llama

Said = Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("folders")
    save_folder(base / "float", tiny_llama())
    options: dict[str, Any] = {"embeddings": "int8@group:32", "rules": [("re:.*v_proj", None)], "progress": False}
    quantize_checkpoint(base / "float", base / "packed", "int4@group:32:asym", **options)
    for to in ("gptq", "compressed-tensors"):
        export_language_model(base / "packed", base / to, to)
    quantize_checkpoint(base / "float", base / "symmetric", "int4@group:32", progress=False)
    export_language_model(base / "symmetric", base / "awq", "awq")
    import_language_model(base / "awq", base / "imported")
    return base


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def info(path: Path, code: int = 0) -> str:
        assert run(["info", str(path)]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return info


def test_a_packed_folder_has_a_line_for_each_layer(folders: Path, said: Said):
    text = said(folders / "packed")
    assert re.search(r"a LlamaForCausalLM, [\d,]+ bytes on disk", text)
    assert "packed by weights=int4@group:32:minmax:asym, embeddings=int8@group:32" in text
    assert re.search(r"layers\.0\.mlp\.up_proj \.\.\. .*layers\.1\.mlp\.up_proj +2 +96x64 +int4@group:32:asym", text)
    assert re.search(r"model\.embed_tokens +32x64 +int8@group:32 ", text)
    assert "the weight of model.embed_tokens" in text
    assert "float: 7 tensors of F32" in text
    assert "int4@group:32 " in said(folders / "imported")


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_folders_of_other_libraries_say_how_they_are_quantized(to: str, folders: Path, said: Said):
    text = said(folders / to)
    assert f"quantized by another library, quant_method={to}" in text
    assert "golden-stick import" in text
    assert ("bits=4" in text) == (to != "compressed-tensors")


def test_float_folders_and_gguf_files_say_what_they_are(folders: Path, tmp_path: Path, said: Said):
    assert "numbers of F32; golden-stick quantize packs it" in said(folders / "float")
    pytest.importorskip("gguf", reason="the package gguf reads GGUF files")
    text = said(save_gguf(tmp_path / "a.gguf", tiny_llama()))
    assert "a LlamaForCausalLM in a GGUF file, quantized as Q8_0" in text


def test_a_run_is_its_options_and_its_networks(tmp_path: Path, said: Said):
    (tmp_path / "demo.json").write_text(json.dumps({"data": "digits", "model": "lenet5"}))
    text = said(tmp_path)
    assert "a folder of golden-stick demo: data=digits, model=lenet5" in text
    assert "no network is saved in it yet" in text
    import torch

    net, x = build("lenet5", in_channels=1, num_classes=10, image_size=8), torch.zeros(2, 1, 8, 8)
    algo = SimQAT(act=None)
    save(algo.convert(algo.apply(net, x), x), tmp_path / "model")
    assert "1. simqat, converted after 0 steps" in said(tmp_path)
    assert "1. simqat, converted after 0 steps" in said(tmp_path / "model")


def test_a_package_says_what_it_takes(tmp_path: Path, said: Said):
    about = {"version": VERSION, "shape": [1, 8, 8], "dtype": "float32", "device": "cpu", "pixels": None}
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("net/data/x_metadata.json", json.dumps({KEY: json.dumps(about)}))
    assert "a .pt2 package" in (text := said(tmp_path / "net.pt2"))
    assert "takes batchx1x8x8 float32 on cpu" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere", None, "nothing there"),
        ("net.onnx", b"x", "an ONNX file"),
        ("weights.bin", b"x", "a file of another kind"),
        ("net.pt2", b"x", "must be a whole .pt2 package"),
        ("net.gguf", b"GGUFx", "must be a GGUF file that transformers reads"),
        ("other.gguf", b"nothing", "got a file that starts"),
        ("folder/thesis.txt", b"x", "a folder with thesis.txt"),
        ("folder/demo.json", b"[", "demo.json must be JSON"),
        ("folder/config.json", b"[]", "config.json must hold a JSON object"),
        ("folder/config.json", b"{}", "must hold model.safetensors"),
        ("folder/config.json", b'{"auto_map": {"AutoConfig": "a.B"}}', "config.json must name no code to run"),
    ],
)
def test_what_is_something_else_is_one_line(name: str, content: bytes | None, words: str, tmp_path: Path, said: Said):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    text = said(tmp_path / "folder" if name.startswith("folder") else path, code=2)
    assert text.count("\n") == 1, text
    assert words in text


def test_the_system_is_versions_instructions_and_kernels(capsys: pytest.CaptureFixture[str], monkeypatch):
    assert run(["info", "--system"]) == 0
    text = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in text and f"the kernels take {instruction_set()}" in text
    assert f"CPU kernels: loaded from {library.path_of(instruction_set())}" in text
    monkeypatch.setattr(library, "path_of", lambda name: Path("/no/library"))
    monkeypatch.setattr(library, "_problems", {})
    library.library.cache_clear()
    try:
        assert run(["info", "--system"]) == 0
    finally:
        library.library.cache_clear()
    assert "/no/library was not built; run `python -m gs_kernels.cpu.build`" in capsys.readouterr().out


@pytest.mark.parametrize("given, got", [([], "neither"), (["--system", "a"], "both")])
def test_a_path_or_the_system(given: list[str], got: str, capsys: pytest.CaptureFixture[str]):
    assert run(["info", *given]) == 2
    assert capsys.readouterr().err == f"golden-stick: info: a path or --system must be given, got {got}\n"
