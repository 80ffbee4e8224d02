"""`golden-stick latency`: built-in networks, language models, and what is refused."""

from __future__ import annotations

import json

import pytest

from gs_algos.cli.app import run
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

QUICK = ["--seconds", "0"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_built_in_network_is_timed_and_the_file_is_read_again(tmp_path, capsys):
    arguments = ["latency", "lenet5", "--choices", "int8@channel, int4@channel", *QUICK]
    assert run([*arguments, "--out", "times.json", "--batch", "3"]) == 0
    shown = capsys.readouterr().out
    assert "int8@channel" in shown and "ms of a forward of 3" in shown and "5 networks with random" in shown
    before = (tmp_path / "times.json").read_text()
    assert json.loads(before)["rows"][0]["x"][0] == 3
    assert run([*arguments, "--out", "times.json", "--batch", "3"]) == 0
    assert (tmp_path / "times.json").read_text() == before


def test_without_choices_it_says_where_the_time_goes(tmp_path, capsys):
    assert run(["latency", "lenet5", "--choices", "none", *QUICK]) == 0
    assert "(between layers)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_packed_language_model_has_the_times_of_its_layers(tmp_path, capsys):
    save_folder(tmp_path / "float", tiny_llama())
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed", "int4@group:32", progress=False)
    assert run(["latency", "packed", "--input-shape", "2,8", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj" in shown and "ms a forward of 2" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lenet5", "--choices", "int9@channel"], "1 to 8 bits"),
        (["lenet5", "--input-shape", "1,1,8,8"], "latency: --input-shape goes with package.module:function"),
        (["lenet5", "--batch", "0"], "batch must be a whole number from 1 on"),
        (["lenet5", "--device", "tpu"], "latency: --device must be"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, words, capsys):
    assert run(["latency", *arguments, *QUICK]) == 2
    assert words in capsys.readouterr().err
