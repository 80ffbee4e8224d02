"""bench.search records each row as it comes and measures none twice; its budget is that of 3 bits."""

from __future__ import annotations

import json

import pytest
from torch import nn

from bench import record, search
from gs_algos.demo.models import build

FOUND = {"nbytes": 1, "macs": 1, "score": None, "untuned": 1.0, "accuracy": 1.0, "search_cpu_seconds": 0.0}


def test_a_row_that_is_there_is_not_measured_again(monkeypatch, tmp_path):
    calls = []

    def measure(args, net, data, way, seed):
        calls.append((way, seed))
        if len(calls) == 2:
            raise KeyboardInterrupt  # the run is cut
        return FOUND

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "float_network", lambda args, data: (nn.Identity(), 90.0))
    line = ["--data", "digits", "--train-images", "100", "--ways", "uniform", "ilp", "--seeds", "0", "1"]
    with pytest.raises(KeyboardInterrupt):
        search.main(line)
    assert search.main(line) == 0 == search.main(line)
    assert calls == [("uniform", 0), ("ilp", 0), ("ilp", 0), ("uniform", 1), ("ilp", 1)]
    rows = [json.loads(text) for path in tmp_path.glob("*/*.jsonl") for text in path.read_text().splitlines()]
    assert [(row["way"], row["seed"]) for row in rows] == [("uniform", 0), ("ilp", 0), ("uniform", 1), ("ilp", 1)]


def test_the_budget_is_3_bits_and_a_scale_of_32_a_channel():
    net = build("resnet20", in_channels=1, num_classes=10, image_size=28)
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and name != "stem.0"}
    numbers, channels = sum(m.weight.numel() for m in convs.values()), sum(m.out_channels for m in convs.values())
    bits, unit = search.uniform_budget(net).split()
    assert unit == "bits" and abs(float(bits) * numbers - 3 * numbers - 32 * channels) < 1e-3 * numbers
    assert (numbers, channels) == (269_824, 768)


def test_a_way_of_another_task_is_refused(capsys):
    assert search.main(["--data", "digits", "--train-images", "100", "--ways", "l2"]) == 2
    assert "--ways: must be of uniform, ilp, ddpg, random, evolution" in capsys.readouterr().err
