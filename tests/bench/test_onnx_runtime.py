"""The rows that hold ONNX Runtime to our converted networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import onnx_runtime as script


def test_both_networks_are_exported_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the dev extra")
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(script.record, "append", lambda row, kind, device: rows.append({"kind": kind, **row}))
    options = ["--model", "lenet5", "--data", "digits", "--float-epochs", "2", "--epochs", "1", "--batch-size", "64"]
    assert script.main([*options, "--state", str(tmp_path), "--device", "cpu", "--threads", "1"]) == 0
    assert [(row["kind"], row["model"]) for row in rows] == [("onnx_runtime", "lenet5"), ("onnx_runtime", "mlp")]
    assert rows[0]["operators"] == ["DequantizeLinear", "QuantizeLinear"]
    assert rows[1]["operators"] == ["MatMulNBits"]
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["parity"]["written"]["images"] == 359
        assert row["parity"]["written"]["differing_predictions"] == 0
        assert row["parity"]["written"]["median_relative"] < 1e-3
        assert row["nbytes"]["onnx"] < row["nbytes"]["float_weights"]


def test_images_that_differ_are_counted():
    ours = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    theirs = torch.tensor([[3.0, 4.0], [3.0, 4.001], [5.0, 4.0]])
    found = script.apart(ours, theirs)
    assert (found["differing_predictions"], found["within_1e3"], found["exact_images"]) == (1, 2, 1)
    assert found["median_relative"] == pytest.approx(2e-4, rel=1e-2)


def test_missing_data_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert script.main(["--data", "cifar10:/nowhere", "--state", str(tmp_path)]) == 2
    assert "data_batch_1.bin" in capsys.readouterr().err
