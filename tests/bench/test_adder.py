"""`bench.adder` measures what agrees, and writes a row a layer."""

from __future__ import annotations

import json

import pytest
import torch

from bench import adder
from gs_kernels import adder_int8
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


def test_products_of_planes_are_differences():
    layer = adder.Layer(2, 3, 5, 7, 3, 2)
    generator = torch.Generator().manual_seed(0)
    image, filters = (
        torch.randint(0, 8, size, generator=generator, dtype=torch.int8) for size in adder.sizes_of(layer)
    )
    want = adder_int8(image, filters, stride=2, padding=1)
    assert torch.equal(adder.l1_by_planes(layer, image, filters, 8), want.float())


@pytest.mark.skipif(library() is None, reason="there are no C++ kernels")
def test_planes_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(adder, "ROUNDS", 1)
    monkeypatch.setattr(adder, "LAYERS", (adder.Layer(1, 3, 5, 6, 3, 2),))
    monkeypatch.setattr(adder.torch, "set_num_threads", lambda count: None)
    assert adder.main(["--planes", "--seconds", "0.001", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["kind"] == "adder planes" and list(row["ms"]) == ["adder int8", "planes 2 bit", "planes 3 bit"]
