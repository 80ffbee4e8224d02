"""The benchmark of other libraries' PTQ, with a stand-in for the library: its row, its table, and what is refused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import ptq_peers, record
from bench.tables import language
from tests.nets.language_models import TEXT, save_folder, tiny_llama

SIZES = ["--tokens", "64", "--context", "16", "--samples", "2", "--threads", "1", "--steps", "3"]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 12)
    model = save_folder(tmp_path / "model", tiny_llama())
    return ["--model", str(model), "--text", str(tmp_path / "text.txt"), *SIZES]


def run_here(args: argparse.Namespace, task: str) -> dict[str, Any]:
    return json.loads(json.dumps(ptq_peers.measure(argparse.Namespace(**{**vars(args), "task": task}))))


def test_a_row_says_what_the_library_was_told_and_is_held_to_the_float_model(paths, tmp_path, monkeypatch):
    jobs = []

    def halve(job):
        jobs.append(job)
        job.model.lm_head.weight.data.mul_(0.5)
        return job.model

    peer = ptq_peers.Peer("torch", "halving", halve, ("samples", "steps"))
    monkeypatch.setitem(ptq_peers.PEERS, "halver", peer)
    monkeypatch.setattr(ptq_peers, "_own_process", run_here)
    assert ptq_peers.main(["--peer", "halver", "--weights", "int3@group:64", "int4@channel", *paths]) == 0
    assert [(job.bits, job.group, job.steps) for job in jobs] == [(3, 64, 3), (4, None, 3)]
    assert [len(window) for window in jobs[0].windows] == [16, 16]
    rows = [json.loads(line) for file in (tmp_path / "results").rglob("*.jsonl") for line in file.open()]
    assert [row["setting"] for row in rows] == ["int3@group:64 halving", "int4@channel halving"]
    for row in rows:
        assert (row["provider"], row["steps"], row["samples"], row["tokens"]) == ("torch", 3, 2, 60)
        assert row["perplexity_change"] != 0 and min(row["peak_bytes"], row["perplexity"]) > 0
        assert row["seconds"] >= 0 and row["cpu_seconds"] >= 0


@pytest.mark.parametrize(
    "name, message", [("nobody", "--peer must be one of llmcompressor-gptq"), ("hqq", "hqq, which is not installed")]
)
def test_a_library_that_is_not_known_or_not_there_is_one_line(paths, capsys, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setattr(ptq_peers.importlib.util, "find_spec", lambda module: None)
    assert ptq_peers.main(["--peer", name, *paths]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--text", "none.txt", "--text must be a file"),
        ("--model", "none", "--model must be a Transformers folder"),
        ("--weights", "int4@here", "int4@here"),
    ],
)
def test_what_is_not_there_is_one_line(paths, capsys, monkeypatch, option, value, message):
    monkeypatch.setitem(ptq_peers.PEERS, "one", ptq_peers.Peer("torch", "one", lambda job: job.model))
    assert ptq_peers.main(["--peer", "one", *paths, option, value]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_ours_and_theirs_stand_side_by_side_and_those_of_ours_are_not_mixed():
    about = {"kind": "ptq", "model": "m", "samples": 4, "context": 16, "threads": 1, "perplexity_change": 0.5}
    theirs = {"provider": "lib", "version": "1.2", "weight": "int4@channel", "seconds": 9.6, "peak_bytes": 2e9}
    rows = [
        {**about, "setting": "int4@channel gptq", "perplexity": 9.0, "cpu_seconds": 3.2, "ratio": 0.5},
        {**about, "setting": "int4@channel nearest", "perplexity": 9.5},
        {**about, "setting": "int4@channel gptq int8@token", "perplexity": 1.0},
        {**about, "setting": "int4@channel gptq, cache int8@token", "perplexity": 1.0},
        {**about, "setting": "int2@group:64 gptq", "perplexity": 1.0},
        {**about, "model": "other", "setting": "int4@channel gptq", "perplexity": 1.0},
        {**about, **theirs, "setting": "int4@channel tuned", "perplexity": 8.0, "steps": 20},
    ]
    assert language.ptq_peers(rows).splitlines()[2:] == [
        "| int4@channel | lib 1.2 | tuned, 20 steps | 64 | 8 | +50.0% | 10 | - | 1 | 2.0 GB |",
        "| int4@channel | golden-stick | gptq | 64 | 9 | +50.0% | - | 3 | 1 | - |",
        "| int4@channel | golden-stick | nearest | - | 9.5 | +50.0% | - | - | 1 | - |",
    ]
    assert len(language.ptq(rows).splitlines()) == 2 + 6
