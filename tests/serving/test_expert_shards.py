"""What a process of an engine holds of packed stacks of experts. Needs no engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gs_algos.quant.packed.experts import weighted_sums
from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat, tensors_of
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.serving.engine_parameters import get_weight, set_weight
from gs_algos.serving.engine_product import engine_qmatmul_grouped
from gs_algos.serving.expert_shards import ExpertShard, Place, check_cuts, expert_shards, experts_at
from gs_kernels import PackedWeight, dequantize_packed

E, H, INNER = 5, 32, 64
OWNER = "model.layers.0.mlp.experts"
NAMES = {part: part for part in WEIGHT_TENSORS}


def stacks(scheme: str) -> dict[str, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (E * 2 * INNER, H), "down_proj": (E * H, INNER)}
    return {part: round_to_nearest(torch.randn(shape, generator=generator), scheme) for part, shape in shapes.items()}


def formats(weights: dict[str, PackedWeight]) -> dict[str, PackedFormat]:
    return {part: PackedFormat.of(weight) for part, weight in weights.items()}


def held(shard: ExpertShard, weight: PackedWeight) -> PackedWeight:
    """The weight of a layer that was filled as the plugin fills it."""
    layer = nn.Module()
    tensors = {part: shard.cut(part, tensor) for part, tensor in tensors_of(weight).items()}
    empty = tensors_of(shard.format.empty("meta"))
    assert {part: t.shape for part, t in tensors.items()} == {part: t.shape for part, t in empty.items()}
    for part, tensor in tensors.items():
        layer.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
    filled = get_weight(layer, NAMES, shard.format, "canonical")
    return get_weight(layer, NAMES, shard.format, set_weight(layer, NAMES, filled, shard.name))


def outputs(place: Place, weights: dict[str, PackedWeight], x: Tensor, ids: Tensor, share: Tensor) -> Tensor:
    """What one process computes of the experts' outputs."""
    first, down = expert_shards(OWNER, formats(weights), place, hidden=H, inner=INNER)
    gate_up, back = held(first, weights["gate_up_proj"]), held(down, weights["down_proj"])

    def products(rows: Tensor, offsets: Tensor) -> Tensor:
        gate, up = engine_qmatmul_grouped(rows, gate_up, offsets).chunk(2, dim=-1)
        return engine_qmatmul_grouped(functional.silu(gate) * up, back, offsets)

    local = torch.full((E,), len(place.own))
    local[list(place.own)] = torch.arange(len(place.own))
    return weighted_sums(x, local[ids], share, len(place.own), products)


def plain(weights: dict[str, PackedWeight], x: Tensor, ids: Tensor, share: Tensor) -> Tensor:
    w1 = dequantize_packed(weights["gate_up_proj"], torch.float32).view(E, 2 * INNER, H)
    w2 = dequantize_packed(weights["down_proj"], torch.float32).view(E, H, INNER)
    y = torch.zeros_like(x)
    for token, (experts, parts) in enumerate(zip(ids.tolist(), share.tolist(), strict=True)):
        for e, part in zip(experts, parts, strict=True):
            gate, up = (w1[e] @ x[token]).chunk(2)
            y[token] += part * (w2[e] @ (functional.silu(gate) * up))
    return y


PLACES = {
    "alone": [Place(E, tuple(range(E)))],
    "parts of every expert": [Place(E, tuple(range(E)), part, 2) for part in range(2)],
    "whole experts": [Place(E, (0, 1, 2)), Place(E, (3, 4))],
    "in turns": [Place(E, (0, 2, 4)), Place(E, (1, 3))],
    "both": [Place(E, own, part, 2) for own in ((0, 1), (2, 3, 4)) for part in range(2)],
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("scheme", ["int4@group:32", "int2@group:16:asym", "int8@channel", "int1@group:32"])
def test_what_the_processes_compute_adds_up_to_the_experts(places: str, scheme: str):
    weights, generator = stacks(scheme), torch.Generator().manual_seed(1)
    x = torch.randn(7, H, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(7)])
    share = torch.rand(7, 2, generator=generator)
    got = sum(outputs(place, weights, x, ids, share) for place in PLACES[places])
    torch.testing.assert_close(got, plain(weights, x, ids, share), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ids", [[[0, 0]] * 3, [[4, 4]] * 3, []])
def test_one_expert_with_all_tokens_and_no_tokens(ids: list[list[int]]):
    weights, x = stacks("int4@group:32"), torch.randn(len(ids), H)
    chosen, share = torch.tensor(ids, dtype=torch.int64).view(len(ids), 2), torch.full((len(ids), 2), 0.5)
    for places in (PLACES["whole experts"], PLACES["parts of every expert"]):
        got = sum(outputs(place, weights, x, chosen, share) for place in places)
        torch.testing.assert_close(got, plain(weights, x, chosen, share), rtol=1e-4, atol=1e-3)


def test_stacks_are_found_where_the_engine_names_the_mixture_otherwise():
    by_part = formats(stacks("int4@group:32"))
    layers = {f"model.layers.{i}.mlp.experts.{part}": format for i in (0, 10) for part, format in by_part.items()}
    layers["model.layers.0.mlp.shared_expert.down_proj"] = by_part["down_proj"]
    assert experts_at(layers, "model.layers.0.mlp.experts") == (OWNER, by_part)
    assert experts_at(layers, "model.layers.0.block_sparse_moe.experts") == (OWNER, by_part)
    assert experts_at(layers, "model.layers.1.mlp.experts") == ("model.layers.1.mlp.experts", {})
    layers["model.layers.0.other.experts.down_proj"] = by_part["down_proj"]
    with pytest.raises(ValueError, match=r"one module must have the experts of .*, got .*mlp\.experts, .*other"):
        experts_at(layers, "model.layers.0.block_sparse_moe.experts")


def shards(place: Place, inner: int = INNER, **changed: PackedFormat | None) -> tuple[ExpertShard, ExpertShard]:
    given = {part: format for part, format in (formats(stacks("int4@group:32")) | changed).items() if format}
    return expert_shards(OWNER, given, place, hidden=H, inner=inner)


def test_what_does_not_fit_the_model_is_refused():
    every = Place(E, tuple(range(E)))
    with pytest.raises(
        ValueError, match=r"gate_up_proj must be \[5 \* 96, 32\] as the model's sizes say, got \[640, 32\]"
    ):
        shards(every, inner=48)
    with pytest.raises(ValueError, match=r"must be packed in gate_up_proj and down_proj, got only gate_up_proj of"):
        shards(every, down_proj=None)
    with pytest.raises(ValueError, match=r"every process must hold an expert, got 5 of .*; use fewer"):
        shards(Place(E, ()))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"the 640 rows of .*gate_up_proj must divide among 5 experts, 2 .* got a rest of 10"
    ):
        shards(Place(E, tuple(range(E)), 0, 3))[0].format  # noqa: B018


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (3, r"the 64 inner features of .*down_proj must divide among tensor_parallel_size, got 3"),
        (4, r"must be a multiple of group_size 32, got 64 / 4 = 16; use a tensor_parallel_size of 1, 2, or quantize"),
    ],
)
def test_cuts_of_experts_that_do_not_divide_are_refused(parts: int, words: str):
    layers = {f"{OWNER}.{part}": format for part, format in formats(stacks("int4@group:32")).items()}
    check_cuts(layers, 2)
    check_cuts({"model.layers.0.mlp.down_proj": replace(layers[f"{OWNER}.down_proj"], shape=(32, 65))}, 2)
    with pytest.raises(ValueError, match=words) as raised:
        check_cuts(layers, parts)
    assert "--enable-expert-parallel, which cuts no expert" in str(raised.value)
