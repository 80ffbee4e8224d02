"""`golden-stick search`, and searches in recipes and demos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gs_algos
from gs_algos.cli.app import run
from gs_algos.demo.models import build

FEW = ["--evaluations", "2", "--samples", "64", "--device", "cpu"]


def lenet() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("lenet5", in_channels=1, num_classes=10, image_size=8)


def test_it_prints_rules_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file(lenet().state_dict(), tmp_path / "float.safetensors")
    files = ["--weights", str(tmp_path / "float.safetensors"), "--out", str(tmp_path / "page.html")]
    files += ["--journal", str(tmp_path / "j.jsonl")]
    assert run(["search", "lenet5", "--budget", "14% bytes", "--act", "none", *files, *FEW]) == 0
    said = capsys.readouterr().out
    assert "simqat: rules=[(" in said and "recipe: options = { rules = [[" in said and "of the float network" in said
    page = (tmp_path / "page.html").read_text()
    assert "Cost and quality" in page and "<circle" in page and "<script" not in page
    assert (tmp_path / "j.jsonl").is_file() and "random weights" not in said


def test_prune_rates_and_bits_from_the_command_line(capsys: pytest.CaptureFixture[str]):
    words = ["--algorithm", "prune,simqat", "--choices", "0,0.5,int4@channel,int8@channel", "--budget", "12% bytes"]
    assert run(["search", "lenet5", *words, *FEW]) == 0
    said = capsys.readouterr().out
    assert "prune: rules=" in said and "simqat: rules=" in said and "has random weights" in said


@pytest.mark.parametrize(
    "words, told",
    [
        (["--budget", "1% bytes"], "the budget must allow at least"),
        (["--samples", "0"], "--samples must be in 1..1438 for digits, got 0"),
        (["--batch", "100000"], "data must hold at least as many samples as the example inputs"),
        (["--algorithm", "haq"], "--algorithm must be what compresses the network, got haq"),
        (["--agent", "ipl"], "agent must be one of"),
        (["--weights", "nowhere"], "nowhere must be a safetensors file of the float network"),
    ],
)
def test_what_is_wrong_is_one_line(words, told, capsys: pytest.CaptureFixture[str]):
    assert run(["search", "lenet5", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_a_recipe_searches_and_a_resumed_one_has_the_same_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(lenet().state_dict(), "float.safetensors")
    head = 'model = "lenet5"\ndata = "digits"\nweights = "float.safetensors"\n[[stage]]\nalgorithm = "simqat"\n'
    Path("run.toml").write_text(head + 'epochs = 0\n[stage.search]\nbudget = "14% bytes"\nevaluations = 2\n')
    assert run(["compress", "--recipe", "run.toml", "--out", "out", "--device", "cpu"]) == 0
    entry = gs_algos.history(gs_algos.load("out/stages/1-simqat", lenet))[-1]
    assert entry["algorithm"] == "simqat" and entry["config"]["rules"]
    assert Path("out/search-1.jsonl").is_file()
    assert "1-simqat" in capsys.readouterr().out
