"""What an engine holds of a packed weight: layers stacked into one, and cut between processes. Needs no engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gs_algos.quant.packed.module import PackedFormat
from gs_algos.serving.shards import refuse_unserved, shard, stacked
from gs_kernels import PackedWeight, dequantize_packed, pack_weight

FORMAT = PackedFormat(bits=4, shape=(96, 384), group_size=64, zero=8.0, scale_dtype="float16")


def packed(bits: int, n: int, k: int, group: int) -> PackedWeight:
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    return pack_weight(codes, torch.rand(n, k // group) + 0.1, 2.0 ** (bits - 1), bits=bits, group_size=group)


def test_layers_that_are_packed_alike_are_stacked():
    layers = {"q": FORMAT, "k": replace(FORMAT, shape=(32, 384)), "o": replace(FORMAT, bits=2)}
    assert stacked(layers, ["q", "k", "k"]) == replace(FORMAT, shape=(160, 384))
    assert stacked(layers, ["o"]) == layers["o"]
    assert stacked(layers, ["gate", "up"]) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["q", "o"], "o: 2 bits in groups of 64, zero point 8, float16 scales"),
        (["q", "v"], "v: float"),
        (["q", "t"], "t: 4 bits in groups of 64, a zero point per group, float16 scales, a table of levels"),
    ],
)
def test_others_are_refused(names: list[str], said: str):
    layers = {"q": FORMAT, "o": replace(FORMAT, bits=2), "t": replace(FORMAT, zero=None, levels=True)}
    with pytest.raises(ValueError, match="must be packed alike") as raised:
        stacked(layers, names)
    assert said in str(raised.value) and "quantize them again under one rule" in str(raised.value)


@pytest.mark.parametrize(("bits", "group", "parts"), [(4, 64, 3), (1, 32, 4), (2, 384, 2), (8, 128, 3)])
def test_a_cut_weight_is_a_part_of_the_whole(bits: int, group: int, parts: int):
    """The bytes that `shard` describes, sliced as an engine slices them, dequantize to columns of the whole."""
    whole = packed(bits, 16, 384, group)
    columns = 384 // parts
    part = shard(PackedFormat.of(whole), "o_proj", 16, columns)
    per_part = columns // part.group_size
    codes = whole.codes[:, columns * bits // 8 : 2 * columns * bits // 8].contiguous()
    scale = whole.scale if group == 384 else whole.scale[:, per_part : 2 * per_part].contiguous()
    weight = replace(part.empty("cpu"), codes=codes, scale=scale)
    want = dequantize_packed(whole, torch.float32)[:, columns : 2 * columns]
    assert torch.equal(dequantize_packed(weight, torch.float32), want)


def test_rows_are_cut_anywhere():
    assert shard(FORMAT, "q", 7, 384) == replace(FORMAT, shape=(7, 384))


def test_a_cut_through_a_group_is_refused():
    with pytest.raises(
        ValueError, match=r"K / tensor_parallel_size of o_proj must be a multiple of group_size 64"
    ) as e:
        shard(FORMAT, "o_proj", 96, 96)
    assert "got 384 / 4 = 96; use a tensor_parallel_size of 1, 2, 3, 6, or" in str(e.value)


def test_a_cut_through_a_byte_is_refused():
    per_row = PackedFormat(bits=1, shape=(8, 24), group_size=24, zero=0.5, scale_dtype="float32")
    with pytest.raises(ValueError, match=r"must be a whole number of bytes of codes, got 24 / 2 = 12; .* of 1, 3, or"):
        shard(per_row, "down", 8, 12)


def test_4_bit_floats_are_refused():
    name = "model.layers.0.mlp.down_proj"
    refuse_unserved({name: FORMAT})
    floats = replace(FORMAT, scale_dtype="float8_e8m0fnu", levels=True, zero=0.0)
    with pytest.raises(ValueError, match="in 4-bit floats; vLLM reads what golden-stick export"):
        refuse_unserved({name: floats})
