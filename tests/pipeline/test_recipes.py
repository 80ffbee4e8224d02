"""Recipes that cannot be run are refused in one line before anything is trained, and nothing of an earlier run goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gs_algos.cli.app import run
from gs_algos.pipeline.recipe import read_recipe

HEAD = 'model = "lenet5"\ndata = "digits"\nfloat_epochs = 0\n'
STAGE = '[[stage]]\nalgorithm = "simqat"\nepochs = 0\n'
WRONG: dict[str, tuple[str, str]] = {
    "lr nan": (f"{HEAD}{STAGE}lr = nan", "stage 1: lr must be finite and > 0, got nan"),
    "lr infinite": (f"{HEAD}{STAGE}lr = inf", "lr must be finite and > 0, got inf"),
    "lr below": (f"{HEAD}{STAGE}lr = -1.0", "lr must be finite and > 0, got -1.0"),
    "batch of none": (f"batch_size = 0\n{HEAD}{STAGE}", "batch_size must be >= 1, got 0"),
    "no pixels": (f"image_size = 0\n{HEAD}{STAGE}", "image_size must be >= 1, got 0"),
    "seed": (f"seed = {2**62}\n{HEAD}{STAGE}", "seed must be within 32 bits"),
    "rule of one": (f'{HEAD}{STAGE}options = {{rules = [["fc"]]}}', "every rule must be [pattern, options]"),
    "rule nested": (f'{HEAD}{STAGE}options = {{rules = [[["fc"]]]}}', "every rule must be [pattern, options]"),
    "rule of numbers": (f"{HEAD}{STAGE}options = {{rules = [[1, 2]]}}", "every rule must be [pattern, options]"),
    "rule of a date": (f'{HEAD}{STAGE}options = {{rules = [["fc", 2020-01-01]]}}', "every rule must be [pattern, opt"),
    "twice": (f"{HEAD}{STAGE}{STAGE}", "simqat must be in one stage, since it quantizes what is float, got it in 2"),
    "nothing learned": (
        f'{HEAD}[[stage]]\nalgorithm = "scop"\nepochs = 0\noptions = {{rate = 0.4}}',
        "stage 1: epochs must be >= 1 for scop, which has to learn what to cut, got 0",
    ),
    "fused": (
        f'{HEAD}[[stage]]\nalgorithm = "slb"\nepochs = 1\noptions = {{fused = true}}',
        "slb: fused needs an optimizer of its own",
    ),
    "no weights": (f'weights = "nowhere"\n{HEAD}{STAGE}', "nowhere must hold a float lenet5, got"),
    "folder": (f'weights = "."\n{HEAD}{STAGE}', ". must hold a float lenet5, got"),
}


@pytest.mark.parametrize("text, words", WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_one_line_and_leaves_an_earlier_run_alone(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(text)
    Path("out").mkdir()
    before = {"recipe.json": "{}", "float.state.safetensors": "hours of training"}
    for name, content in before.items():
        (Path("out") / name).write_text(content)
    assert run(["compress", "--recipe", "run.toml", "--out", "out", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert {path.name: path.read_text() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "must be a readable .json file, got one nested too deeply"),
        ('{"model": "lenet5", "model": "mlp"}', "got the key 'model' twice"),
    ],
)
def test_json_that_no_recipe_is(text: str, words: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_recipe(tmp_path / "run.json")


def test_a_name_that_is_too_long_is_not_repeated():
    with pytest.raises(ValueError, match=r"^recipe: the file must be a path that this file system can have") as caught:
        read_recipe("a" * 5000 + ".toml")
    assert len(str(caught.value)) < 300
