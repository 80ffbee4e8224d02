"""`golden-stick compress` distills the stages that a recipe says so of, also after an interruption."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gs_algos import Distill, Prune, Synthesis
from gs_algos.cli import compress, synthetic
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
train_teacher = true
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


@pytest.fixture
def small_generator(monkeypatch):
    monkeypatch.setattr(synthetic, "Synthesis", partial(Synthesis, width=8, batch_size=64))
    monkeypatch.setattr(synthetic, "IMAGES", 320)
    monkeypatch.setattr(compress, "STEPS", 60)


def test_stages_are_trained_on_synthetic_images(tmp_path, monkeypatch, small_generator):
    seen: list[Tensor] = []
    train = compress.train_compressed

    def watched(net, data, *more):
        seen.append(data.train_x)
        return train(net, data, *more)

    monkeypatch.setattr(compress, "train_compressed", watched)
    recipe, out = written(tmp_path, RECIPE.replace("float_epochs = 0", "float_epochs = 12")), tmp_path / "out"
    arguments = ["compress", "--recipe", str(recipe), "--out", str(out), "--device", "cpu", "--data", "synthetic"]
    assert command(arguments) == 0
    assert [list(x.shape) for x in seen] == [[320, 1, 8, 8]] * 2 and seen[0].dtype == torch.uint8
    assert json.loads((out / "recipe.json").read_text())["synthetic"] == 60
    assert command([*arguments, "--resume"]) == 0 and len(seen) == 2  # all was done
    assert command([*arguments[:-2], "--resume"]) == 2  # another recipe: on data


def test_a_synthesis_goes_on_after_an_interruption(tmp_path, monkeypatch, small_generator):
    recipe = written(tmp_path, RECIPE.replace("float_epochs = 0", "float_epochs = 12"))
    stop = {"at": 20}

    @contextmanager
    def bar(what: str):
        def on_step(done: int, total: int, loss: Tensor) -> None:
            if done == stop["at"]:
                signal.raise_signal(signal.SIGINT)

        yield on_step

    monkeypatch.setattr(synthetic, "bar", bar)
    arguments = ["compress", "--recipe", str(recipe), "--device", "cpu", "--data", "synthetic"]
    assert command([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    stop["at"] = 0
    assert command([*arguments, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert command([*arguments, "--out", str(tmp_path / "whole")]) == 0
    got, want = (load_file(tmp_path / name / "images.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_collapsed_generator_ends_the_command(tmp_path, monkeypatch, small_generator, capsys):
    monkeypatch.setattr(compress, "STEPS", 1)
    recipe = written(tmp_path, RECIPE)
    assert command(["compress", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--data", "synthetic"]) == 2
    assert "the images must be of all classes" in capsys.readouterr().err
