"""The rows of a language model that its float self teaches, and their table."""

from __future__ import annotations

import json

import pytest
import torch

from bench import distill, record
from bench.tables import language
from gs_algos import PTQ
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from tests.nets.language_models import TEXT, save_folder, tiny_llama


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(distill, "CONTEXT", 16)
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 12)
    model = save_folder(tmp_path / "model", tiny_llama())
    return ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--threads", "1", "--context", "8"]


def test_a_run_leaves_a_row_at_its_start_and_every_so_many_steps(place, tmp_path):
    sizes = [
        "--weight",
        "int2@group:32:asym",
        "--start",
        "int2@group:32",
        "--steps",
        "4",
        "--every",
        "2",
        "--samples",
        "2",
        "--tokens",
        "64",
    ]
    assert distill.main([*place, *sizes]) == 0
    rows = [json.loads(line) for file in (tmp_path / "results").rglob("*.jsonl") for line in file.open()]
    assert [(row["kind"], row["step"], row["trained_tokens"]) for row in rows] == [
        ("distill", 0, 0),
        ("distill", 2, 32),
        ("distill", 4, 64),
    ]
    assert all(row["perplexity"] > 1 and row["float"] > 1 for row in rows)
    model, tokenizer = load_language_model(tmp_path / "model", dtype=torch.float32)
    ids = tokenizer((tmp_path / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    algo = PTQ(weight="int2@group:32", rules=[("lm_head", None)])
    batches = [{"input_ids": window[None]} for window in ids[126:158].split(16)]
    model = algo.apply(model, batches[0])
    algo.calibrate(model, batches)
    started = perplexity(algo.convert(model), ids[:64], 16, progress=False).value
    assert rows[0]["perplexity"] == pytest.approx(started, rel=1e-3)
    table = language.distilled(rows).splitlines()
    assert len(table) == 3
    assert f"| 64 | {rows[0]['perplexity']:.4g} | {rows[2]['perplexity']:.4g} |" in table[2]


def test_a_text_that_is_too_short_is_refused(place, capsys):
    assert distill.main([*place, "--steps", "1000"]) == 2
    assert "half of the text must hold 16000 tokens, got 126; lower --steps" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--every", "--batch-size", "--context", "--samples", "--tokens"])
def test_a_count_below_1_is_refused_before_a_model_is_read(option, capsys):
    with pytest.raises(SystemExit):
        distill.main(["--model", "none", "--text", "none", option, "0"])
    assert f"{option} must be >= 1, got 0" in capsys.readouterr().err
