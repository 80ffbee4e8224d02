"""Every example runs, and does what it says, with a small setting; it uses public names alone."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gs_algos
import gs_kernels
from gs_algos.core import registry
from tests.helpers import INTERPRET

pytestmark = pytest.mark.skipif(
    INTERPRET, reason="TRITON_INTERPRET=1: nothing of the examples is about the interpreter"
)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PUBLIC = {"gs_algos": {*gs_algos.__all__}, "gs_kernels": {*gs_kernels.__all__}}


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls `main` of an example, in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    return lambda name, *arguments: runpy.run_path(str(EXAMPLES / name))["main"](*arguments)


def test_a_resnet_is_trained_for_8_bits_and_comes_back_as_it_was(main, capsys):
    pytest.importorskip("sklearn")
    trained, loaded = main("qat_resnet.py", 1, 1, "net")
    assert trained == loaded > 0.2
    assert "share scale" in capsys.readouterr().out


def test_weights_of_2_bits_are_found_and_come_back(main, capsys):
    pytest.importorskip("sklearn")
    trained, loaded = main("low_bit_search.py", 2, "net")
    assert trained == loaded > 0.3
    assert "float x packed codes" in capsys.readouterr().out


def test_a_network_is_pruned_then_quantized_and_the_run_goes_on_where_it_was(main, capsys):
    pytest.importorskip("sklearn")
    first = main("prune_then_quantize.py", 1, 1, "run")
    assert "16 of 32" in capsys.readouterr().out and min(first) > 0.2
    assert main("prune_then_quantize.py", 1, 1, "run") == first


def test_a_language_model_is_packed_and_goes_on_with_a_text(main, tmp_path):
    pytest.importorskip("transformers")
    from tests.nets.language_models import save_folder, tiny_llama

    save_folder(tmp_path / "float", tiny_llama())
    text = main("pack_llm.py", "float", "packed", "in the beginning", 32)
    assert text.startswith("in the beginning") and (tmp_path / "packed" / "config.json").is_file()


def test_an_algorithm_of_ones_own_is_applied_saved_and_loaded(main):
    net = main("your_own_algorithm.py", 3, "net")
    assert all(((m.weight.view(-1, 4) != 0).sum(1) == 2).all() for m in (net[0], net[2]))
    (entry,) = gs_algos.history(net)
    assert (entry["algorithm"], entry["stage"], entry["steps"]) == ("n-of-four", "converted", 3)


def test_an_algorithm_of_ones_own_is_resumed(main, tmp_path):
    names = runpy.run_path(str(EXAMPLES / "your_own_algorithm.py"))
    algo, net = names["NOfFour"](keep=1), names["build"]()
    algo.apply(net, None)
    algo.step()
    gs_algos.save(net, tmp_path / "net")
    resumed = names["NOfFour"].resume(gs_algos.load(tmp_path / "net", names["build"]))
    assert (resumed.config.keep, resumed.steps) == (1, 1)


def commands(folder: Path, *arguments: str) -> list[list[str]]:
    """What serve_vllm.sh calls golden-stick with."""
    stub = folder / "golden-stick"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" --end-- >> "$CALLS"\n')
    stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run(["bash", EXAMPLES / "serve_vllm.sh", *arguments], env=env, check=True, cwd=folder)
    return [call.split("\n")[:-1] for call in (folder / "calls").read_text().split("--end--\n")[:-1]]


def test_the_commands_that_serve_a_language_model_are_those_of_the_command(tmp_path):
    typer = pytest.importorskip("typer")
    from gs_algos.cli.app import app

    group = typer.main.get_command(app)
    calls = commands(tmp_path, "float", "packed", "--port", "8001")
    assert [call[0] for call in calls] == ["quantize", "info", "serve"]
    for name, *arguments in calls:
        context = group.commands[name].make_context(name, list(arguments))
        assert context.args == (["--port", "8001"] if name == "serve" else [])
    (tmp_path / "packed").mkdir()
    (tmp_path / "calls").unlink()
    assert [call[0] for call in commands(tmp_path, "float", "packed")] == ["info", "serve"]


def test_the_plug_in_that_vllm_looks_for_is_there():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = points["golden-stick"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_uses_public_names_alone(path):
    used: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {(name.name, "") for name in node.names if "." in name.name}
        elif isinstance(node, ast.ImportFrom):
            used |= {(str(node.module), name.name) for name in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
    ours = {(place, name) for place, name in used if place.partition(".")[0] in PUBLIC}
    assert ours and not [pair for pair in ours if pair[0] not in PUBLIC or pair[1] not in PUBLIC[pair[0]]]


def test_examples_are_no_part_of_the_distribution():
    setuptools = pytest.importorskip("setuptools")
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = setuptools.find_namespace_packages(str(ROOT), include=include)
    assert "gs_algos.core" in packages and not [name for name in packages if name.startswith("examples")]
