"""Bits chosen layer by layer under a budget."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gs_algos
from gs_algos import PTQ, mixed_bits, quantize_weights

CHOICES = ("int2@group:16", "int4@group:16", "int8@channel")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(self.gate(h).relu() * self.up(h))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    for depth, layer in enumerate(model.layers):
        layer.down.weight.data *= 2.0**-depth  # the first blocks matter most
    return model


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 32) for _ in range(4)]


def divergence(model: nn.Module, rounded: nn.Module) -> float:
    with torch.no_grad():
        p, q = (F.log_softmax(n(torch.cat(batches())), -1) for n in (model, rounded))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_beats_the_same_bytes_for_every_layer():
    found = mixed_bits(net(), batches(), "5 bits", CHOICES)
    mixed = quantize_weights(net(), "int4@group:16", rules=found.rules, progress=False)
    uniform = quantize_weights(net(), "int4@group:16", progress=False)
    assert found.bits <= 5  # 4 bits and a scale of 16 for 16 weights
    assert divergence(net(), mixed) < 0.8 * divergence(net(), uniform)


def test_bytes_are_those_of_the_packed_network():
    model = net()
    found = mixed_bits(model, batches(), "40% bytes", CHOICES)
    packed = quantize_weights(model, "int4@group:16", rules=found.rules, progress=False)
    assert found.nbytes == sum(t.nbytes for t in packed.state_dict().values())


def test_readers_of_one_tensor_get_one_scheme():
    found = mixed_bits(net(), batches(), "4 bits", CHOICES)
    assert len(set(found.schemes.values())) > 1
    for depth in range(4):
        assert found.schemes[f"layers.{depth}.gate"] == found.schemes[f"layers.{depth}.up"]


def test_rules_name_every_layer_once():
    found = mixed_bits(net(), batches(), "4 bits", CHOICES)
    for name, scheme in found.schemes.items():
        hits = [options["weight"] for pattern, options in found.rules if pattern == name or _matches(pattern, name)]
        assert hits == [scheme]


def _matches(pattern: str, name: str) -> bool:
    return pattern.startswith("re:") and re.fullmatch(pattern[3:], name) is not None


def test_rules_go_through_ptq():
    model, data = net(), batches()
    found = mixed_bits(model, data, "4 bits", CHOICES, rules=[("head", None)])
    algo = PTQ(weight="int4@group:16", rules=[("head", None), *found.rules])
    planned = {row.site: row.settings.weight for row in algo.plan(model, data[0]).acted()}
    assert planned == found.schemes and "head" not in planned


def test_layers_of_a_rule_have_no_choice_and_count():
    found = mixed_bits(net(), batches(), "40% bytes", CHOICES, rules=[("head", "int8@channel")])
    packed = quantize_weights(net(), "int4@group:16", rules=[("head", "int8@channel"), *found.rules], progress=False)
    assert "head" not in found.schemes
    assert found.nbytes == sum(t.nbytes for t in packed.state_dict().values())


def test_a_group_that_does_not_divide_is_no_choice_there():
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    found = mixed_bits(model, [torch.randn(8, 24)], "9 bits", CHOICES)
    assert found.schemes["0"].startswith("int8") and any(note.startswith("0 can take int8") for note in found.notes)


def test_the_table_ends_with_rules_to_paste():
    text = str(mixed_bits(net(), batches(), "4 bits", CHOICES))
    assert "predicted divergence" in text and text.splitlines()[-1].startswith("rules=[(")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "1 bits"}, r"must allow the smallest choices, .* bits a weight, .* bytes in all, got '1 bits'"),
        ({"budget": "small"}, "budget must be like '4.5 bits', '80 MB' or '30% bytes', got 'small'"),
        ({"choices": ["int4@channel"]}, "choices must be two schemes or more"),
        ({"choices": ["int4@channel", "int5@channel"]}, "bits must be one of 1, 2, 3, 4, 8"),
        ({"choices": ["int4@group:48", "int8@group:48"]}, "one choice must fit layers.0.gate, got none"),
        ({"rules": [("re:.*", "int8@channel")]}, "at least one layer must have a choice"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        mixed_bits(net(), batches(), **{"choices": CHOICES, **options})


def test_it_is_public():
    assert gs_algos.mixed_bits is mixed_bits
