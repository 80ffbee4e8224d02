"""Rows of the scripts that measure scores and advice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gs_algos
from bench import record, reports, sensitivity


@pytest.fixture
def rows(monkeypatch):
    found = []
    monkeypatch.setattr(record, "append", lambda row, kind, device: found.append({"kind": kind, **row}))
    return found


def test_rank_correlation_is_that_of_ranks():
    assert sensitivity.rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert sensitivity.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert sensitivity.ranks(torch.tensor([5.0, 1.0, 5.0])).tolist() == [1.5, 0.0, 1.5]


def test_a_row_for_each_score_and_range_of_widths(rows):
    assert sensitivity.main(["--model", "mlp", "--epochs", "1", "--policies", "4", "--test-images", "64"]) == 0
    assert {(row["score"], row["widths"]) for row in rows} == {
        (score, widths) for score in ("kl", "gradient", "nsr") for widths in ("2-8", "3-6")
    }
    assert all(-1 <= row["correlation"] <= 1 and row["test"] == 64 for row in rows)


def test_what_advice_predicts_stands_beside_what_the_network_gives(rows, monkeypatch, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6)).eval()
    net[2].weight.data *= 20

    def quantize(rules):
        return gs_algos.quantize_weights(copy.deepcopy(net), "int2@channel", rules=rules, progress=False)

    subject = reports.Subject(net, quantize, list(torch.randn(4, 32, 16)), [torch.randn(64, 16)], "int2@channel", 32)
    monkeypatch.setitem(reports.SUBJECTS, "resnet20", lambda args: subject)
    assert reports.main(["--network", "resnet20", "--out", str(tmp_path)]) == 0
    (row,) = rows
    assert row["measured_divergence"] < row["divergence"] and row["samples"] == 64
    assert (tmp_path / "resnet20.html").stat().st_size == row["page_bytes"]


def test_what_is_missing_is_one_line(capsys):
    assert reports.main(["--network", "smollm2"]) == 2
    assert "--model and --text of smollm2" in capsys.readouterr().err
