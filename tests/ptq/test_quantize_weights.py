"""Packing a whole model in place: which layers, ties, rules, what is refused, and how it is saved and loaded."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import PackedEmbedding, PackedLinear, quantize_weights
from gs_algos.core.algorithm import history
from gs_algos.core.plan import PlanRow
from gs_algos.ptq import weights as weights_module
from gs_algos.ptq.weights import summary
from gs_kernels import PackedWeight
from tests.helpers import relative_rms, same_bits


class Net(nn.Module):
    """A language model in miniature: embedding, two linears, a head tied to the embedding."""

    def __init__(self, tied: bool = True, max_norm: float | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64, max_norm=max_norm)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False))
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids)))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


IDS = torch.tensor([[3, 1, 4], [1, 5, 49]])


def kinds(model: nn.Module) -> dict[str, str]:
    names = ("embed", "block.0", "block.2", "head")
    return {name: type(model.get_submodule(name)).__name__ for name in names}


def bits(model: nn.Module) -> dict[str, int]:
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}


def test_linears_are_packed_and_embeddings_with_their_heads_are_kept():
    model = net()
    assert quantize_weights(model, "int8@group:32") is model
    assert kinds(model) == {
        "embed": "Embedding", "block.0": "PackedLinear", "block.2": "PackedLinear", "head": "Linear"
    }  # fmt: skip
    assert model.head.weight is model.embed.weight
    assert relative_rms(model(IDS), net()(IDS)) < 0.02
    kept = {row["site"]: row["reason"] for row in history(model)[0]["plan"] if row["action"] == "keep"}
    assert kept == {"embed": "embeddings are kept"}


def test_a_head_of_its_own_is_a_linear_like_any():
    assert kinds(quantize_weights(net(tied=False), "int8@group:32"))["head"] == "PackedLinear"


def test_an_embedding_and_its_head_share_one_packed_weight():
    model = quantize_weights(net(), "int8@group:32", embeddings="int4@group:16")
    assert isinstance(model.embed, PackedEmbedding)
    assert isinstance(model.head, PackedLinear)
    assert model.head.packed.codes is model.embed.codes
    assert not [key for key in model.state_dict() if key.startswith("head")]
    assert relative_rms(model(IDS), net()(IDS)) < 0.2


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_rule_on_any_name_of_a_tied_weight_is_for_all(name: str):
    model = quantize_weights(net(), "int4@group:32", rules=[(name, "int8@channel")])
    assert bits(model) == {"embed": 8, "block.0": 4, "block.2": 4, "head": 8}


def test_the_last_rule_wins_and_none_keeps_a_layer():
    rules = [("block", None), ("re:.*2", {"weight": "int1@group:32"}), ("block.2", "int2@group:32")]
    model = quantize_weights(net(tied=False), "int4@group:32", rules=rules)
    assert bits(model) == {"block.2": 2, "head": 4}
    assert history(model)[0]["plan"][1]["reason"] == "kept by a rule"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4@group:128"}, r"divide the 64 inputs of block\.0, got int4@group:128.*2 such.*use group:64"),
        ({"weights": "int5@channel"}, "bits must be one of 1, 2, 4, 8, got int5.*use int8"),
        ({"weights": "int4@channel:lsq"}, "lsq needs training"),
        ({"embeddings": "int6@channel"}, "use int8"),
        ({"rules": [("block.7", None)]}, r"every rule must match a layer, got block\.7.*did you mean block"),
        ({"rules": ["block"]}, r"a rule must be \(pattern, options\)"),
        ({"rules": [("block", {"act": "int8@tensor"})]}, "a rule may set weight, got act"),
        ({"rules": [("head", None), ("embed", "int8@channel")]}, "embed and head share one weight.*got int8.*and None"),
        ({"rules": [("type:Linear", None)]}, "at least one layer must be left to pack, got 3 layers"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_touched(options: dict[str, Any], words: str):
    model = net()
    with pytest.raises(ValueError, match=words):
        quantize_weights(model, **{"weights": "int4@channel", **options})
    assert kinds(model) == kinds(net())


def test_a_weight_that_is_not_finite_is_found_before_any_layer_is_packed():
    model = net()
    model.block[2].weight.data[5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"block\.2\.weight must be finite"):
        quantize_weights(model, "int4@channel")
    assert kinds(model) == kinds(net())


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="must have data, got a meta tensor; use quantize_checkpoint"):
        quantize_weights(model, "int4@channel")


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"must have a nn\.Linear or nn\.Embedding, got ReLU"):
        quantize_weights(nn.ReLU(), "int4@channel")
    with pytest.raises(ValueError, match=r"needs a nn\.Embedding"):
        quantize_weights(nn.Sequential(nn.Linear(4, 4)), "int4@channel", embeddings="int8@channel")


def test_a_packed_model_is_refused():
    with pytest.raises(RuntimeError, match="must not be packed yet"):
        quantize_weights(quantize_weights(net(), "int8@channel"), "int4@channel", embeddings="int8@channel")


def test_subclasses_whose_forward_is_their_own_are_left_alone():
    attention = nn.MultiheadAttention(8, 2)
    model = quantize_weights(nn.Sequential(attention, nn.Linear(8, 8)), "int8@channel")
    assert model[0].out_proj.weight is attention.out_proj.weight
    model = quantize_weights(net(tied=False, max_norm=1.0), "int8@channel", embeddings="int8@channel")
    assert kinds(model)["embed"] == "Embedding"
    assert history(model)[0]["plan"][0]["reason"] == "max_norm changes rows as they are read"


def test_each_float_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch):
    model = net(tied=False)
    floats = [weakref.ref(layer.weight) for layer in (model.block[0], model.block[2], model.head)]
    alive: list[int] = []
    original = weights_module.rounded

    def watched(*args: Any) -> PackedWeight:
        alive.append(sum(weight() is not None for weight in floats))
        return original(*args)

    monkeypatch.setattr(weights_module, "rounded", watched)
    quantize_weights(model, "int4@channel")
    assert alive == [3, 2, 1]


def test_a_packed_model_is_saved_and_loaded_exactly(tmp_path: Path):
    options = {
        "embeddings": "int4@group:32:asym",
        "rules": [("block.2", "int1@group:32"), (nn.Embedding, "int2@channel")],
    }
    model = quantize_weights(net(), "int8@group:32:mse", **options)  # type: ignore[arg-type]
    gs_algos.save(model, tmp_path)
    loaded = gs_algos.load(tmp_path, Net)
    assert same_bits(loaded(IDS), model(IDS))
    assert history(loaded) == history(model)
    assert loaded.head.packed.codes is loaded.embed.codes


def test_loading_into_another_network_is_refused(tmp_path: Path):
    gs_algos.save(quantize_weights(net(), "int8@channel"), tmp_path)

    def other() -> nn.Module:
        model = Net()
        model.block[0] = nn.Linear(64, 32)
        return model

    with pytest.raises(ValueError, match=r"build_model must make the network.*block\.0\.weight must be \[96, 64\]"):
        gs_algos.load(tmp_path, other)


def test_packing_the_float_layers_that_training_left_is_restored_in_order(tmp_path: Path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    algo = gs_algos.SimQAT(rules=[("2", None)])
    model = algo.convert(algo.apply(build(), x), x)
    quantize_weights(model, "int4@group:8")
    gs_algos.save(model, tmp_path)
    loaded = gs_algos.load(tmp_path, build)
    assert [entry["algorithm"] for entry in history(loaded)] == ["simqat", "quantize_weights"]
    assert same_bits(loaded(x), model(x))


def test_the_summary_counts_bytes():
    text = summary(quantize_weights(net(), "int4@group:32", embeddings="int8@channel"))
    assert text.splitlines()[-1] == "4 packed layers, 10,212 bytes; 384 bytes of float parameters"
    assert "tied" in text


def test_the_plan_of_the_history_is_made_of_plan_rows():
    rows = history(quantize_weights(net(), "int4@group:32"))[0]["plan"]
    assert all(PlanRow.fits(row) for row in rows)
