"""The benchmark of PTQ on a tiny Llama: every setting gives a row that is held to the float model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import ptq, record
from bench.tables import language
from tests.nets.language_models import TEXT, save_folder, tiny_llama


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    settings = {
        "float": {},
        "int4 nearest": {"weight": "int4@group:32", "rounding": "nearest", "refine": 0},
        "int4 gptq": {"weight": "int4@group:32"},
        "float, cache int4": {"kv": "int4@token"},
        "other": {"weight": "int8@channel"},
    }
    monkeypatch.setattr(ptq, "SETTINGS", settings)
    monkeypatch.setattr(ptq, "_own_process", lambda args, name: _here(args, name))
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    model = save_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 12)
    options = ["--tokens", "64", "--context", "16", "--samples", "4", "--threads", "1", "--only", "int4"]
    assert ptq.main(["--model", str(model), "--text", str(tmp_path / "text.txt"), *options]) == 0
    return [json.loads(line) for file in (tmp_path / "results").rglob("*.jsonl") for line in file.open()]


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


def test_a_text_that_is_not_there_is_said(tmp_path, capsys):
    assert ptq.main(["--model", "m", "--text", str(tmp_path / "none.txt")]) == 2
    assert "--text must be a file" in capsys.readouterr().err
