"""The benchmark of PTQ on a tiny Llama: every setting gives a row that is held to the float model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ptq, ptq_peers, record
from bench.tables import language
from tests.nets.language_models import TEXT, save_folder, tiny_llama


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    settings = {
        "float": {},
        "int4 nearest": {"weight": "int4@group:32", "rounding": "nearest", "refine": 0},
        "int4 gptq": {"weight": "int4@group:32"},
        "float, cache int4": {"kv": "int4@token"},
        "int8 signround": {"weight": "int8@channel", "rounding": "signround"},
        "other": {"weight": "int8@channel"},
    }
    monkeypatch.setattr(ptq, "SETTINGS", settings)
    monkeypatch.setattr(ptq, "_own_process", lambda args, name: _here(args, name))
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    save_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 12)
    return _rows(tmp_path, "--samples", "4", "--only", "int4")


def _rows(folder: Path, *options: str) -> list[dict[str, Any]]:
    sizes = ["--tokens", "64", "--context", "16", "--threads", "1"]
    assert ptq.main(["--model", str(folder / "model"), "--text", str(folder / "text.txt"), *sizes, *options]) == 0
    return [json.loads(line) for file in (folder / "results").rglob("*.jsonl") for line in file.open()]


def _here(args: Any, name: str) -> dict[str, Any]:
    args.setting = name
    row = ptq.measure(args)
    args.setting = ""
    return json.loads(json.dumps(row))


def test_the_chosen_settings_are_held_to_the_float_model(rows):
    assert [row["setting"] for row in rows] == ["float", "int4 nearest", "int4 gptq", "float, cache int4"]
    full, nearest, gptq, cached = rows
    assert full["perplexity_change"] == 0 and {row["tokens"] for row in rows} == {4 * 15}
    assert gptq["perplexity_change"] == pytest.approx(gptq["perplexity"] / full["perplexity"] - 1, abs=1e-6)
    assert 0 < gptq["ratio"] < 1 and gptq["seconds"] > 0 and "seconds" not in nearest
    assert cached["perplexity_change"] != 0 and cached["samples"] == 0
    assert min(cached["tokens_per_s"], full["tokens_per_s"], cached["nbytes_cache"]) > 0 and "nbytes_cache" not in full


def test_the_table_has_a_line_per_setting(rows):
    lines = language.ptq(rows).splitlines()
    assert len(lines) == 2 + 4 and any("| model | int4 gptq |" in line and " 64 |" in line for line in lines)


def test_what_is_tuned_says_its_steps_and_windows(rows, tmp_path):
    row = _rows(tmp_path, "--samples", "8", "--window", "4", "--steps", "3", "--only", "signround")[-1]
    assert (row["setting"], row["steps"], row["window"], row["samples"]) == ("int8 signround", 3, 4, 8)
    assert "| int8 signround, 3 steps, 8 windows of 4 |" in language.ptq([row]) and " 32 |" in language.ptq([row])


def test_windows_are_of_the_second_half_of_the_text():
    def ids(text, **options):
        return argparse.Namespace(input_ids=torch.tensor([[ord(c) for c in text]]))

    windows = ptq.calibration_windows(ids, "abcdefghijkl", 2, 3)
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["ghi", "jkl"]
    with pytest.raises(ValueError, match="must have 2 x 4 tokens, got 6"):
        ptq.calibration_windows(ids, "abcdefghijkl", 2, 4)


def test_a_text_that_is_not_there_is_said(tmp_path, capsys):
    assert ptq.main(["--model", "m", "--text", str(tmp_path / "none.txt")]) == 2
    assert "--text must be a file" in capsys.readouterr().err


@pytest.mark.parametrize("main", [ptq.main, lambda argv: ptq_peers.main(["--peer", "hqq", *argv])])
@pytest.mark.parametrize("option, value, least", [("--window", 0, 2), ("--steps", 0, 1), ("--samples", -1, 1)])
def test_a_count_that_is_too_small_is_said(capsys, main, option, value, least):
    with pytest.raises(SystemExit) as stop:
        main(["--model", "m", "--text", "t", option, str(value)])
    assert stop.value.code == 2 and f"{option} must be >= {least}, got {value}" in capsys.readouterr().err
