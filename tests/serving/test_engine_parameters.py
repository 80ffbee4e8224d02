"""The packed weight of the words that an engine loaded, and as parameters of its layer. Needs no engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat
from gs_algos.serving.engine_parameters import from_words, get_weight, set_weight
from gs_kernels import PackedWeight, dequantize_packed, pack_weight
from gs_kernels.pack.formats.compressed_tensors import to_compressed_tensors

NAMES = {part: f"weight_{part}" for part in WEIGHT_TENSORS}


def packed(bits: int, group: int, zero: torch.Tensor | float) -> PackedWeight:
    codes = torch.randint(0, 2**bits, (48, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.arange(1, 48 * 128 // group + 1).view(48, -1) / 64
    return pack_weight(codes, scale, zero, bits=bits, group_size=group)


def words(weight: PackedWeight, parts: list[int] | None = None, group_size: int | None = None) -> PackedWeight:
    tensors, _ = to_compressed_tensors(weight)
    return from_words(
        tensors["weight_packed"],
        tensors["weight_scale"],
        tensors.get("weight_zero_point"),
        bits=weight.bits,
        parts=parts or [32, 16],
        columns=128,
        group_size=group_size or weight.group_size,
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_become_a_weight_and_parameters(bits: int, group: int, symmetric: bool):
    zero = torch.arange(48 * 128 // group).view(48, -1) % 2**bits
    weight = packed(bits, group, 2.0 ** (bits - 1) if symmetric else zero.float())
    loaded, layer = words(weight), nn.Module()
    layout = set_weight(layer, NAMES, loaded, "up")
    again = get_weight(layer, NAMES, PackedFormat.of(loaded), layout)
    assert torch.equal(dequantize_packed(again, torch.float32), dequantize_packed(weight, torch.float32))
    assert len(list(layer.parameters())) == (2 if symmetric else 3)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_damaged_scale_is_refused():
    weight = packed(4, 32, 8.0)
    with pytest.raises(ValueError, match=r"up.scale must be finite, got nan at \[0, 0\]"):
        set_weight(
            nn.Module(), NAMES, replace(weight, scale=weight.scale.index_fill(0, torch.tensor(0), torch.nan)), "up"
        )


def test_layers_that_end_within_a_word_of_zero_points_are_refused():
    weight = packed(4, 32, torch.full((48, 4), 3.0).index_fill(0, torch.tensor(1), 5))
    with pytest.raises(ValueError, match=r"must be a multiple of 8, got 44; use a smaller tensor_parallel_size"):
        words(weight, parts=[44, 4])
    assert words(packed(4, 32, 8.0), parts=[44, 4]).shape == (48, 128)  # no zero points, no words of them


def test_scales_of_another_grouping_are_refused():
    with pytest.raises(ValueError, match=r"128 columns must have 2 groups, got 4 scales a row"):
        words(packed(4, 32, 8.0), group_size=64)
