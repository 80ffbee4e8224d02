"""Networks and data of one's own on the command line: `package.module:function`, in recipes and in options."""

from __future__ import annotations

from pathlib import Path

import pytest

from gs_algos.cli.app import run

MODULE = """
import torch
from torch import nn

def small(num_classes=3):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)

def five():
    return small(5)

def deep(depth):
    return small()

def grey():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def number():
    return 3

def pictures():
    x = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 3
    return (x[:18], y[:18]), (x[18:], y[18:])

def floats():
    (x, y), test = pictures()
    return (x / 255, y), test

def one():
    return torch.zeros(3)

def keyed():
    return {}["layers"]

def silent():
    assert False

def torn():
    raise TypeError("first line\\nsecond line")

constant = 7
"""
RECIPE = """
model = "{model}"
data = "{data}"
float_epochs = 1
image_size = 8
[[stage]]
algorithm = "simqat"
epochs = 1
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current folder, another for each test."""
    name = f"mine_of_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def compress(model: str, data: str) -> int:
    Path("recipe.toml").write_text(RECIPE.format(model=model, data=data))
    return run(["compress", "--recipe", "recipe.toml", "--out", "out", "--device", "cpu"])


def test_a_recipe_takes_a_network_and_data_of_ones_own(mine: str, capsys: pytest.CaptureFixture[str]):
    assert compress(f"{mine}:small", f"{mine}:pictures") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "1-simqat" in said
    assert "saved, and equal when loaded" in said
    assert (Path("out") / "stages" / "1-simqat" / "golden_stick.json").is_file()


def test_a_recipe_takes_a_network_of_ones_own_for_a_folder_of_pictures(mine: str, capsys: pytest.CaptureFixture[str]):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; it is in the dev extra")
    for color, name in enumerate(("blue", "green", "red")):
        (Path("pictures") / name).mkdir(parents=True)
        for number in range(8):
            image.new("RGB", (9, 9), tuple(250 if c == color else number for c in range(3))).save(
                Path("pictures") / name / f"{number}.png"
            )
    assert compress(f"{mine}:small", "imagefolder:pictures") == 0, capsys.readouterr().err
    assert "1-simqat" in capsys.readouterr().out


def test_the_demo_takes_them_too_and_export_finds_the_network_again(mine: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    options = ["--model", f"{mine}:small", "--data", f"{mine}:pictures", "--float-epochs", "1", "--epochs", "1"]
    assert run(["demo", *options, "--device", "cpu", "--out", "out"]) == 0, capsys.readouterr().err
    assert run(["export", "out", "net.onnx", "--to", "onnx"]) == 0, capsys.readouterr().err
    assert Path("net.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            "five",
            "pictures",
            "must give logits [2, 3] of two images of MINE:pictures, which has 3 classes, got [2, 5",
        ),
        ("grey", "pictures", "MINE:grey: the inputs must run through the model, got RuntimeError"),
        ("deep", "pictures", "needs at most in_channels, num_classes, image_size, got one that needs depth"),
        ("number", "pictures", "MINE:number() must return a torch.nn.Module, got int"),
        ("keyed", "pictures", "MINE:keyed() must return, got KeyError: 'layers'; --debug shows where"),
        ("silent", "pictures", "MINE:silent() must return, got AssertionError; --debug shows where"),
        ("torn", "pictures", "MINE:torn() must return, got TypeError: first line; --debug shows where"),
        ("small", "keyed", "MINE:keyed() must return, got KeyError: 'layers'; --debug shows where"),
        ("constant", "pictures", "MINE:constant must name an importable function, got int"),
        ("missing", "pictures", "must name an importable function, got: module 'MINE' has no attribute 'missing'"),
        ("small", "floats", "images [N, C, S, S] in uint8 and labels [N] in int64, got torch.float32 and torch.int64"),
        ("small", "one", "MINE:one() must return ((x, y), (x, y))"),
    ],
)
def test_what_is_wrong_with_them_is_one_line(
    model: str, data: str, words: str, mine: str, capsys: pytest.CaptureFixture[str]
):
    assert compress(f"{mine}:{model}", f"{mine}:{data}") == 2
    said = capsys.readouterr().err
    assert words.replace("MINE", mine) in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("no_such_module:net", "digits", "no_such_module:net must name an importable function, got: No module named"),
        ("nets/mine.py:net", "digits", "got a file; write nets.mine:net"),
        ("alexnet", "digits", "one of lenet5, lenet5-bn, resnet20, "),
        ("lenet5", "cifar9:DIR", "data: must be one of digits, fashion-mnist"),
    ],
)
def test_a_name_that_is_none_is_one_line(
    model: str,
    data: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert compress(model, data) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_plan_and_compress_read_a_name_in_one_way(mine: str, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", f"{mine}:deep", "--input-shape", "2,3,8,8"]) == 2
    assert (
        f"{mine}:deep must be a function that needs no arguments, got one that needs depth" in capsys.readouterr().err
    )
    assert run(["plan", f"{mine}:small", "--input-shape", "2,3,8,8"]) == 0


def test_plan_says_what_a_function_raised_and_debug_shows_where(mine: str, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", f"{mine}:keyed", "--input-shape", "2,3,8,8"]) == 2
    said = capsys.readouterr().err
    assert said == f"golden-stick: {mine}:keyed() must return, got KeyError: 'layers'; --debug shows where\n"
    with pytest.raises(ValueError, match="KeyError") as caught:
        run(["--debug", "plan", f"{mine}:keyed", "--input-shape", "2,3,8,8"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_that_cannot_be_imported_is_one_line(mine: str, capsys: pytest.CaptureFixture[str]):
    Path(f"{mine}_b.py").write_text("import os\nROOT = os.environ['NO_SUCH_VARIABLE_OF_MINE']\n")
    assert run(["plan", f"{mine}_b:net", "--input-shape", "2,3,8,8"]) == 2
    said = capsys.readouterr().err
    assert f"{mine}_b:net must name an importable function, got KeyError: 'NO_SUCH_VARIABLE_OF_MINE'" in said
    assert said.count("\n") == 1
