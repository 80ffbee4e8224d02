"""The rows of training without data, and their table."""

from __future__ import annotations

import json

import pytest

from bench import record, synthesis
from bench.tables import networks


def test_a_run_leaves_a_row_every_so_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    sizes = ["--width", "8", "--batch-size", "64", "--steps", "60", "--every", "60", "--float-epochs", "10"]
    sizes += ["--replay", "2"]
    place = ["--device", "cpu", "--threads", "1", "--state", str(tmp_path / "state")]
    assert synthesis.main(["--data", "digits", *sizes, *place]) == 0
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["kind"], row["steps"], row["of"]) for row in rows] == [("synthesis", 60, 60)]
    assert rows[0]["accuracy"].keys() >= {"float", "student", "noise", "w8a8 on data", "w4a8 on synthetic"}


def test_counts_below_one_are_refused_before_anything_is_read(capsys):
    for name in ("float-epochs", "steps", "every", "replay"):
        with pytest.raises(SystemExit):
            synthesis.main(["--data", "nowhere", f"--{name}", "0"])
        assert f"--{name} must be >= 1, got 0" in capsys.readouterr().err


def test_the_table_has_the_last_row_of_a_run():
    calibrated = {f"{scheme} on {on}": 90.0 for scheme in ("w8a8", "w4a8") for on in ("data", "synthetic", "noise")}
    about = {"kind": "synthesis", "model": "net", "data": "set", "loss": "dafl", "width": 8, "batch_size": 64}
    about |= {"of": 80, "seed": 0, "accuracy": {"float": 98.0, "student": 50.0, "noise": 20.0, **calibrated}}
    last = {**about, "steps": 80, "time": "2", "accuracy": {**about["accuracy"], "student": 97.0}}
    text = networks.synthesis([last, {**about, "steps": 40, "time": "1"}])
    assert text.splitlines()[2:] == [
        "| net | set | dafl | 80 x 64 | 1 | 98.00 | 97.00 | 20.00 | 90.00 / 90.00 / 90.00 | 90.00 / 90.00 / 90.00 |"
    ]
