"""What README names is public, what needs an extra says so in one line, and importing costs no more than it must."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gs_algos
import gs_kernels
from gs_algos import PTQ, SCOP, SLB, Adder, Distill, Ghost, Prune, SimQAT

ROOT = Path(__file__).parents[1]
ALGORITHMS: tuple[Any, ...] = (SimQAT, SLB, SCOP, Prune, PTQ, Distill, Ghost, Adder)
CODE = """
import json, sys, torch
before = set(sys.modules)
import gs_kernels
kernels = set(sys.modules) - before
import gs_algos
new = sorted(set(sys.modules) - before)
shown = dir(gs_algos)
late = [name for name in gs_algos.__all__ if name not in vars(gs_algos)]
found = {name: getattr(gs_algos, name).__module__ for name in late}
print(json.dumps({"kernels": sorted(kernels), "new": new, "shown": shown, "found": found}))
"""
EXTRAS = {
    "transformers",
    "onnx",
    "onnxscript",
    "matplotlib",
    "typer",
    "rich",
    "sklearn",
    "litserve",
    "yaml",
    "PIL",
    "vllm",
}


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a new process has after `import gs_kernels`, `import gs_algos`, and the use of every name."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_kernels_are_imported_without_triton(fresh):
    assert not {name.partition(".")[0] for name in fresh["kernels"]} & {"triton", *EXTRAS}


def test_algorithms_are_imported_without_extras_and_without_what_reads_files_of_others(fresh):
    assert not {name.partition(".")[0] for name in fresh["new"]} & {"triton", *EXTRAS}
    ours = [name for name in fresh["new"] if re.match(r"gs_algos\.(export|llm|demo|pipeline|serving|cli)\.", name)]
    assert [name for name in ours if "registration" not in name] == []


def test_what_is_imported_late_is_shown_and_found(fresh):
    assert {"export_onnx", "export_package", "load_language_model", "quantize_checkpoint"} <= fresh["found"].keys()
    assert set(gs_algos.__all__) <= set(fresh["shown"])
    assert all(module.startswith("gs_algos.") for module in fresh["found"].values())


def test_type_checkers_are_told_of_the_late_names():
    (block,) = [
        node
        for node in ast.parse(Path(gs_algos.__file__).read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    ]
    told = {alias.name: line.module for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert told == gs_algos._LAZY


@pytest.mark.parametrize("package", [gs_algos, gs_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_said_what_it_is(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert not callable(value) or inspect.getdoc(value), name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gs_algos' has no attribute 'quantise_weights'") as told:
        _ = gs_algos.quantise_weights
    assert (told.value.name, told.value.obj) == ("quantise_weights", gs_algos)  # from which Python says what is near


def test_what_readme_calls_is_public():
    words = set(re.findall(r"`([A-Za-z_]\w*)(?:\([^`]*\))?`", (ROOT / "README.md").read_text()))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    known = {"gs_kernels", "gs_algos", *gs_algos.__all__, *gs_kernels.__all__, *extras}
    for algorithm in ALGORITHMS:
        known |= {*dir(algorithm), *(option.name for option in fields(algorithm.config_class))}
    assert [word for word in words if word not in known] == []


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4))


def onnx_of_a_network(folder: Path) -> None:
    gs_algos.export_onnx(net(), torch.ones(2, 8), folder / "net.onnx")


def picture(folder: Path) -> None:
    algo, model = SLB(weight="2bit@channel", total_steps=4), net()
    algo.apply(model, torch.ones(2, 8))
    algo.picture(folder / "search.png")


def packed_folder(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    gs_algos.quantize_checkpoint(folder, folder / "packed")


MISSING: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "export_onnx": ("onnx", onnx_of_a_network, "[onnx]"),
    "export_onnx, half": ("onnxscript", onnx_of_a_network, "[onnx]"),
    "picture": ("matplotlib", picture, "[report]"),
    "load_language_model": ("transformers", lambda folder: gs_algos.load_language_model(folder), "[hf]"),
    "quantize_checkpoint": ("transformers", packed_folder, "[hf]"),
}


@pytest.mark.parametrize("name, call, extra", MISSING.values(), ids=MISSING)
def test_a_missing_extra_is_one_line_with_the_command(name, call, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        (RuntimeError, ValueError), match=re.escape(f"pip install 'golden-stick-triton{extra}'")
    ) as told:
        call(tmp_path)
    assert "\n" not in str(told.value)
