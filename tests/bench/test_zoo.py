"""The walk over many networks tells what was quantized, and of a network that fails the stage and the error."""

from __future__ import annotations

import json

import torch
from torch import nn

from bench import zoo
from tests.nets.graphs import ConvCalledTwice, image

OPTIONS = {"weight": "int8@channel", "act": "int8@tensor:ema"}


class ConvertsBadly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if isinstance(self.fc, nn.Linear) else self.fc(x).foo


def entry(net: nn.Module, inputs: object) -> zoo.Entry:
    return zoo.Entry("here", "family", type(net).__name__, lambda: (net, inputs))


def test_a_network_that_goes_all_the_way():
    row = zoo.walk(entry(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ConvCalledTwice()), image()), OPTIONS)
    assert (row["stage"], row["layers"], row["quantized"], row["folded"]) == ("done", 2, 1, 1)
    assert row["kept"] == {"called * times in one forward pass": 1} and row["layer_error"] < 1e-5
    assert "1/2" in zoo.line(row) and "1x called" in zoo.line(row)


def test_a_network_that_fails_says_where():
    row = zoo.walk(entry(ConvertsBadly(), torch.ones(2, 6)), OPTIONS)
    assert row["stage"] == "convert" and "no attribute 'foo'" in row["error"]
    row = zoo.walk(entry(nn.ReLU(), torch.ones(2, 6)), OPTIONS)
    assert (row["stage"], row["quantized"]) == ("apply", 0)
    assert "apply: ValueError" in zoo.line(row)


def test_rows_are_written_and_the_exit_code_counts_failures(tmp_path, capsys, monkeypatch):
    nets = [entry(nn.Sequential(nn.Linear(6, 3)), torch.ones(2, 6)), entry(nn.ReLU(), torch.ones(2, 6))]
    monkeypatch.setattr(zoo, "LIBRARIES", {"torch": lambda: iter(nets), "no_such_package": None})
    assert zoo.main(["--out", str(tmp_path / "rows.jsonl")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["stage"]) for row in rows] == [("zoo", "done"), ("zoo", "apply")]
    out = capsys.readouterr().out
    assert "no_such_package is not installed" in out and "1 of 2 networks converted" in out


def test_the_smallest_of_a_family_is_found_by_its_name():
    assert zoo.smallest(["resnet50", "resnet18", "resnet101"]) == "resnet18"
    assert zoo.smallest(["convnext_base", "convnext_atto", "convnext_tiny"]) == "convnext_atto"
