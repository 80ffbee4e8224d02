"""`golden-stick compress` distills the stages that a recipe says so of, also after an interruption."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gs_algos import Distill, Prune
from gs_algos.cli import compress
from gs_algos.cli.app import run as command
from gs_algos.demo.models import build
from gs_algos.pipeline.recipe import make_algorithm, read_recipe

RECIPE = """
model = "lenet5"
data = "digits"
float_epochs = 0

[[stage]]
algorithm = "prune"
epochs = 1
options = { rate = 0.25 }

[stage.distill]
features = 0.5
kind = "kernel"
pairs = ["features"]

[[stage]]
algorithm = "simqat"
epochs = 1
options = { weight = "int4@channel" }

[stage.distill]
temperature = 2.0
"""


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def test_a_recipe_says_what_is_distilled(tmp_path):
    recipe = read_recipe(written(tmp_path, RECIPE))
    first, second = (make_algorithm(stage, 10) for stage in recipe.stage)
    assert isinstance(first, Distill) and isinstance(first.inner, Prune) and first.config.kind == "kernel"
    assert isinstance(second, Distill) and second.config.temperature == 2.0


def test_an_interrupted_command_has_the_same_teacher_again(tmp_path, monkeypatch):
    recipe, stop = written(tmp_path, RECIPE), {"in": ""}
    taught: dict[str, Tensor] = {}
    apply = Distill.apply

    def applied(algo, net, inputs):
        taught[f"{len(taught)}"] = next(iter(algo.teacher.parameters())).detach().clone()
        return apply(algo, net, inputs)

    @contextmanager
    def bar(what: str):
        def on_step(done: int, total: int, loss: Tensor) -> None:
            if stop["in"] and what.startswith(stop["in"]) and done == 3:
                signal.raise_signal(signal.SIGINT)

        yield on_step

    def final(out: Path, *more: str) -> dict[str, Tensor]:
        assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu", *more]) == 0
        return load_file(next((out / "stages" / "2-simqat").glob("*.safetensors")))

    monkeypatch.setattr(compress, "bar", bar)
    monkeypatch.setattr(Distill, "apply", applied)
    want = final(tmp_path / "whole")
    assert torch.equal(taught["0"], taught["1"])  # the float network, not the pruned one
    stop["in"] = "2-simqat"
    out = tmp_path / "stopped"
    assert command(["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu"]) == 130
    stop["in"] = ""
    got = final(out, "--resume")
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_another_teacher_is_a_name_and_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(build("mlp", in_channels=1, num_classes=10, image_size=8).state_dict(), "mlp.safetensors")
    text = RECIPE.replace("temperature = 2.0", 'teacher = "mlp"\nweights = "mlp.safetensors"')
    recipe = written(tmp_path, text)
    assert command(["compress", "--recipe", str(recipe), "--out", "out", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "new, words",
    [
        ("temprature = 2.0", "got temprature; did you mean temperature?"),
        ("temperature = 0.0", "stage 2: Distill: temperature must be finite and > 0, got 0.0"),
        ('teacher = "mlp"', "teacher and weights must be two texts, got teacher alone"),
        ('teacher = "mlp"\nweights = "nowhere"', "nowhere must hold a float mlp, got"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(new, words, tmp_path, capsys):
    recipe = written(tmp_path, RECIPE.replace("temperature = 2.0", new))
    assert command(["compress", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
