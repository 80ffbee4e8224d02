"""Paths, devices, schemes and tensors that are none: the error names the caller, and nothing is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gs_algos
from gs_algos import SimQAT
from gs_algos.cli.app import run
from gs_algos.core.files import whole_file
from gs_algos.export.onnx import export_onnx
from gs_algos.export.torch_package import export_package
from gs_algos.llm.interchange import export_language_model, import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from gs_algos.pipeline.pipeline import Pipeline
from gs_algos.quant.scheme import Scheme
from tests.nets.language_models import save_folder, tiny_llama


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    algo = SimQAT(weight="int8@channel", act="int8@tensor")
    net = algo.apply(build(), x)
    net(x)
    return algo.convert(net.eval())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("arguments") / "llama", tiny_llama(False))


TAKERS: dict[str, Callable[[Any], Any]] = {
    "load: directory": lambda path: gs_algos.load(path, build),
    "load_language_model: path": load_language_model,
    "quantize_checkpoint: the source": lambda path: quantize_checkpoint(path, "new"),
    "export_language_model: the source": lambda path: export_language_model(path, "new", "gptq"),
    "import_language_model: the source": lambda path: import_language_model(path, "new"),
}


@pytest.mark.parametrize("who", TAKERS)
@pytest.mark.parametrize("path", [None, 5, b"folder"], ids=str)
def test_what_is_no_path_is_refused_with_the_name_of_the_caller(who: str, path: Any):
    with pytest.raises(TypeError, match=f"^{who} must be a path, text or os.PathLike, got "):
        TAKERS[who](path)


@pytest.mark.parametrize("who", TAKERS)
def test_a_path_with_a_nul_is_refused(who: str):
    with pytest.raises(ValueError, match=f"^{who} must be a path, which has no NUL character"):
        TAKERS[who]("a\0b")


def test_load_asks_for_a_function(tmp_path: Path, net: nn.Module):
    gs_algos.save(net, tmp_path)
    with pytest.raises(TypeError, match=r"^load: build_model must be a function .*, got None"):
        gs_algos.load(tmp_path, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_save_leaves_a_file_in_its_way_alone(below: str, tmp_path: Path, net: nn.Module):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(FileExistsError, match=r"save: directory must be a folder or a free place in one, got a file"):
        gs_algos.save(net, file / below)
    assert file.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_packed_folder_below_a_file_is_refused(tmp_path: Path, llama: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^quantize_checkpoint: the target must be in a folder, got .*, which is a"):
        quantize_checkpoint(llama, tmp_path / "file" / "sub", progress=False)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "vulkan", ""])
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(device: str, tmp_path: Path, llama: Path):
    for call in (
        lambda: load_language_model(llama, device),
        lambda: quantize_checkpoint(llama, tmp_path / "new", device=device),
    ):
        with pytest.raises(ValueError, match=f": device must be .*cpu.*, got '{device}'"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["quantize", str(llama), str(tmp_path / "new"), "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("golden-stick: quantize_checkpoint: device must be")


@pytest.mark.parametrize(
    "text", ["int8@channel:asym:sym", "int8@channel:minmax:mse", "int8@channel:narrow:narrow", "int8@channel:lsq:lsq"]
)
def test_a_scheme_says_everything_once(text: str):
    with pytest.raises(ValueError, match=f"^Scheme: weight must have one of .* in '{text}'"):
        Scheme.parse(text, "weight")


@pytest.mark.parametrize(
    "text", ["int08@channel", "int\N{ARABIC-INDIC DIGIT FOUR}@channel", "int4@group:\N{SUPERSCRIPT TWO}"]
)
def test_a_scheme_has_plain_digits(text: str):
    with pytest.raises(ValueError, match=r"^Scheme: weight"):
        Scheme.parse(text, "weight")


@pytest.mark.parametrize("option, value", [("--temperature", "nan"), ("--temperature", "inf"), ("--seed", str(2**70))])
def test_numbers_that_sampling_cannot_take_are_refused(
    option: str, value: str, llama: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["generate", str(llama), "in", option, value]) == 2
    assert f"generate: {'--max-new-tokens' if value in ('nan', 'inf') else option}" in capsys.readouterr().err


def test_another_dtype_in_an_imported_file_is_damage(tmp_path: Path, llama: Path):
    quantize_checkpoint(llama, tmp_path / "packed", "int4@group:32", progress=False)
    for to, part in (("gptq", "qweight"), ("awq", "qzeros"), ("compressed-tensors", "weight_packed")):
        folder = tmp_path / to
        export_language_model(tmp_path / "packed", folder, to)
        tensors = load_file(folder / "model.safetensors")
        key = f"model.layers.0.self_attn.q_proj.{part}"
        save_file(tensors | {key: tensors[key].float()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{key} must be int32, got float32; .*{to} is damaged"):
            import_language_model(folder, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_load_refuses_an_activation_that_no_layer_has(tmp_path: Path, net: nn.Module):
    index = gs_algos.save(net, tmp_path) / "golden_stick.json"
    facts = json.loads(index.read_text())
    epilogue = facts["history"][0]["plan"][0]["settings"]["epilogue"]
    assert (epilogue["activation"], epilogue["op"]) == ("1", "relu")
    epilogue["op"] = "softplus"
    index.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"0: the activation it takes over must be one of .*relu.*, got 'softplus'"):
        gs_algos.load(tmp_path, build)


@pytest.mark.parametrize(
    "text", ["raise SystemExit(0)", "def make():\n    raise SystemExit(0)"], ids=["module", "function"]
)
def test_a_network_whose_code_ends_the_process_is_an_error(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    name = "ends_" + ("function" if "def" in text else "module")
    (tmp_path / f"{name}.py").write_text(text)
    assert run(["plan", f"{name}:make", "--input-shape", "1,3"]) == 2
    assert "ends the process" in capsys.readouterr().err


@pytest.mark.parametrize("who", TAKERS)
@pytest.mark.parametrize("path", ["a" * 5000, "b/" * 4000 + "c"], ids=["name", "path"])
def test_a_path_that_is_too_long_is_refused_without_repeating_it(who: str, path: str):
    with pytest.raises(ValueError, match=f"^{who} must be a path that this file system can have, got ") as caught:
        TAKERS[who](path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype, kind", [("floaty", TypeError), (5, TypeError), (torch.int8, ValueError)], ids=str)
def test_a_dtype_that_no_model_computes_in_is_refused(dtype: Any, kind: type[Exception], llama: Path, tmp_path: Path):
    with pytest.raises(kind, match=r"^load_language_model: dtype must be None or one of torch.float32, "):
        load_language_model(llama, dtype=dtype)
    with pytest.raises(kind, match=r"^quantize_checkpoint: dtype must be None or one of torch.float32, "):
        quantize_checkpoint(llama, tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("given", [5, None, "simqat", SimQAT()], ids=lambda given: type(given).__name__)
def test_a_pipeline_wants_a_list(given: Any):
    with pytest.raises(TypeError, match=r"^Pipeline: algorithms must be a list such as \[SCOP\(\), SimQAT\(\)\], got "):
        Pipeline(given)


def test_a_pipeline_takes_what_can_be_gone_through_once(tmp_path: Path):
    assert len(Pipeline(algo for algo in (SimQAT(), SimQAT())).algorithms) == 2
    with pytest.raises(TypeError, match=r"^Pipeline: folder must be a path"):
        Pipeline([SimQAT()], folder=5)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="Pipeline: folder must be a folder or a free place in one"):
        Pipeline([SimQAT()], folder=tmp_path / "file")


class _NoRoom:
    """Stands for os.access: nothing may be written."""

    def __init__(self, real: Callable[..., bool]) -> None:
        self.real = real

    def __call__(self, path: Any, mode: int, **options: Any) -> bool:
        return not mode & os.W_OK and self.real(path, mode, **options)


@pytest.mark.parametrize("export, name", [(export_onnx, "net.onnx"), (export_package, "net.pt2")])
def test_an_export_that_cannot_be_written_is_refused_before_the_work(
    export: Any, name: str, tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", _NoRoom(os.access))  # the suite may run as root, whom no mode stops
    with pytest.raises(PermissionError, match=r"the target must be in a folder that can be written to, got") as caught:
        export(net, torch.randn(2, 1, 6, 6), tmp_path / "sub" / name)
    assert str(tmp_path) in str(caught.value) and not list(tmp_path.iterdir())


def test_a_draft_that_cannot_be_written_is_an_error_of_its_target(tmp_path: Path):
    target = tmp_path / "net.onnx"
    with pytest.raises(OSError, match="nothing was written") as caught, whole_file(target) as draft:
        (draft.parent / "sub" / "file").write_text("x")
    assert caught.value.filename == str(target) and not list(tmp_path.iterdir())


LINES: dict[str, tuple[list[str], str]] = {
    "seed": (["demo", "--seed", str(2**70)], f"demo: --seed must be within 32 bits, got {2**70}"),
    "seed below": (["demo", "--seed", str(-(2**40))], "demo: --seed must be within 32 bits"),
    "image size": (["demo", "--image-size", "0"], "demo: --image-size must be at least 1, got 0"),
    "other size": (["demo", "--image-size", "9"], "image_size goes with imagefolder, got 9 for digits, whose images"),
    "shape": (["plan", "tests.nets.convolutional:mlp", "--input-shape", "99999999,99999999"], "that fits into memory"),
    "huge": (["plan", "tests.nets.convolutional:mlp", "--input-shape", "9" * 4000], "needs --input-shape"),
}


@pytest.mark.parametrize("arguments, words", LINES.values(), ids=LINES)
def test_a_number_that_cannot_be_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--out", str(tmp_path / "out")] if arguments[0] == "demo" else []
    assert run([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and len(said) < 400
    assert not (tmp_path / "out").exists()
