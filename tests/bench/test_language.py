"""The language model benchmark on a tiny Llama: every row is there, and relates to the rows it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import language, record
from tests.nets.language_models import TEXT, save_folder, tiny_llama


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the benchmark records, its processes run in this one, against one library that makes all weights 0."""

    def zero(model: Any) -> None:
        for _, linear in language._linears(model):
            linear.weight.data.zero_()

    schemes = (("int8@group:32", "int8@group:32"), ("int1@group:32", None))
    monkeypatch.setattr(language, "SCHEMES", schemes)
    monkeypatch.setattr(language, "PEERS", {"zeros": ("torch", "int4@group:64", zero)})
    monkeypatch.setattr(language, "PROMPT", "in the beginning")
    monkeypatch.setattr(language, "_own_process", lambda task, args: language.run_task(json.loads(json.dumps(task))))
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    model = save_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 12)
    options = ["--tokens", "128", "--context", "32", "--new-tokens", "4", "--repeats", "1", "--threads", "1"]
    before = torch.get_num_threads()
    code = language.main(
        ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--work", str(tmp_path), *options]
    )
    torch.set_num_threads(before)
    assert code == 0
    return [json.loads(line) for file in (tmp_path / "results").rglob("*.jsonl") for line in file.open()]


def test_each_width_is_held_to_the_source_of_the_same_run(rows: list[dict[str, Any]]):
    assert [(row["provider"], row["weights"]) for row in rows] == [
        ("float", "float32"),
        ("float", "bfloat16"),
        ("golden-stick", "int8@group:32"),
        ("golden-stick", "int1@group:32"),
        ("zeros", "int4@group:64"),
    ]
    full, half, eight, one, zeros = rows
    assert {row["tokens"] for row in rows} == {4 * 31}
    assert full["perplexity_change"] == 0
    assert zeros["perplexity"] != full["perplexity"]
    assert one["perplexity_change"] == pytest.approx(one["perplexity"] / full["perplexity"] - 1, abs=1e-6)
    assert abs(eight["perplexity_change"]) < abs(one["perplexity_change"])
    assert half["speed_against_bf16"] == 1
    assert eight["speed_against_bf16"] == pytest.approx(eight["tokens_per_s"] / half["tokens_per_s"], abs=1e-3)
    assert eight["nbytes_tensors"] < half["nbytes_tensors"]
    assert eight["peak_bytes"] >= eight["imported_bytes"] > 0


def test_a_missing_text_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert language.main(["--model", str(tmp_path), "--text", str(tmp_path / "none")]) == 2
    assert "needs --model and --text" in capsys.readouterr().err
