"""`bench.adder` measures what agrees, and writes a row a layer."""

from __future__ import annotations

import json

import pytest

from bench import adder
from gs_kernels.cpu.library import library


@pytest.mark.skipif(library() is None, reason="there are no C++ kernels")
def test_a_row_holds_every_provider(tmp_path, monkeypatch):
    monkeypatch.setattr(adder, "ROUNDS", 1)
    monkeypatch.setattr(adder, "LAYERS", (adder.Layer(1, 3, 5, 6, 3, 2),))
    monkeypatch.setattr(adder.torch, "set_num_threads", lambda count: None)
    assert adder.main(["--seconds", "0.001", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["kind"] == "adder" and row["layer"]["o"] == 5 and min(row["ms"].values()) > 0
    assert list(row["ms"]) == ["adder", "conv2d", "adder dx", "conv2d dx", "adder int8", "conv2d int8", "cdist"]
