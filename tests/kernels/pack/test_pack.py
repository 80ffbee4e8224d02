"""Packed weights: bytes worked out by hand, exact round trips of every width and layout, and what is refused."""

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_kernels import (
    IntFormat,
    PackedWeight,
    PerChannel,
    PerGroup,
    choose_qparams,
    dequantize,
    dequantize_packed,
    pack_codes,
    pack_weight,
    quantize,
    repack,
    unpack_codes,
)
from gs_kernels.pack.checks import check_packed, check_packed_values
from gs_kernels.pack.layouts import BITS, LAYOUTS, codes_shape
from gs_kernels.pack.serialize import from_tensors, to_tensors
from tests.helpers import DEVICE, fenced, same_bits

NAN, INF = float("nan"), float("inf")


def random_codes(n, k, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8).to(DEVICE)


def weight_of(n=6, k=64, bits=4, group_size=16, **kwargs):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(n, k // group_size, generator=generator).to(DEVICE) + 0.1
    return pack_weight(random_codes(n, k, bits), scale, bits=bits, group_size=group_size, **kwargs)


def parts(weight):
    """Everything that tells two weights apart, tensors as lists."""
    as_list = [t.tolist() if isinstance(t, torch.Tensor) else t for t in (weight.scale, weight.zero, weight.levels)]
    return weight.codes.tolist(), *as_list, weight.bits, weight.shape, weight.group_size, weight.layout


@pytest.mark.parametrize(
    "bits, codes, packed",
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b00000001]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b00_00_00_11]),
        (4, [0x1, 0xF, 0x8], [0xF1, 0x08]),
        (8, [0x00, 0x7F, 0xFF], [0x00, 0x7F, 0xFF]),
    ],
)
def test_canonical_bytes_are_those_of_the_specification(bits, codes, packed):
    codes = torch.tensor([codes], dtype=torch.uint8)
    assert pack_codes(codes, bits).tolist() == [packed]
    assert torch.equal(unpack_codes(torch.tensor([packed], dtype=torch.uint8), bits, codes.shape), codes)


@pytest.mark.parametrize(
    "bits, codes, container, word",
    [
        (1, {0: 1, 8: 0, 120: 1}, 0, 0x8001),
        (1, {15: 1, 23: 1}, 7, 0b110),
        (2, {0: 1, 16: 2, 112: 3}, 0, 0xC009),
        (4, {5: 1, 37: 2, 69: 3, 101: 4}, 5, 0x4321),
        (8, {63: 0x12, 127: 0xFE}, 63, 0xFE12),
    ],
)
def test_planar_fields_are_stripes_of_k(bits, codes, container, word):
    row = torch.zeros(1, 130, dtype=torch.uint8)
    for k, code in codes.items():
        row[0, k] = code
    row[0, 129] = 1
    packed = pack_codes(row, bits, "planar").int() & 0xFFFF
    assert packed.shape == (2, 1, 8 * bits)
    assert packed[0, 0, container] == word and packed[0].count_nonzero() == 1
    assert packed[1, 0].tolist() == [0, 1] + [0] * (8 * bits - 2)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    n=st.integers(1, 9),
    k=st.integers(1, 300),
    layout=st.sampled_from(LAYOUTS),
    strides=st.sampled_from(["dense", "sliced", "reversed", "spread"]),
    seed=st.integers(0, 2**31),
)
def test_codes_come_back_bit_for_bit(bits, n, k, layout, strides, seed):
    codes = random_codes(n, k, bits, seed)
    packed = pack_codes(fenced(codes, strides), bits, layout)
    assert packed.is_contiguous() and tuple(packed.shape) == codes_shape(layout, n, k, bits)
    assert torch.equal(unpack_codes(fenced(packed, strides), bits, (n, k), layout), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_buffers_hold_no_other_bits(bits, layout, poisoned):
    ones = torch.full((3, 131), 2**bits - 1, dtype=torch.uint8, device=DEVICE)
    packed = pack_codes(ones, bits, layout)
    set_bits = sum(int(((packed.int() >> b) & 1).sum()) for b in range(8 * packed.element_size()))
    assert set_bits == 3 * 131 * bits
    assert torch.equal(unpack_codes(packed, bits, (3, 131), layout), ones)


@pytest.mark.parametrize("bits", BITS)
def test_repacking_there_and_back_changes_nothing(bits):
    weight = weight_of(n=5, k=200, bits=bits, group_size=40)
    planar = repack(weight, "planar")
    assert planar.layout == "planar" and planar.codes.dtype == torch.int16
    assert parts(repack(planar, "canonical")) == parts(weight)
    assert repack(weight, "canonical") is weight
    assert torch.equal(dequantize_packed(planar), dequantize_packed(weight))


def test_values_are_code_minus_zero_times_scale():
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[1.0, 2.0], [0.5, -4.0]]), torch.tensor([[0.0, 1.0], [1.5, 2.0]])
    weight = pack_weight(codes, scale, zero, bits=2, group_size=2)
    assert dequantize_packed(weight).tolist() == [[0.0, 1.0, 2.0, 4.0], [0.75, 0.25, 4.0, 8.0]]


def test_values_of_uneven_levels_are_looked_up():
    levels = torch.tensor([-1.0, -0.25, 0.5, 1.0])
    weight = pack_weight(torch.tensor([[0, 3, 2, 1]], dtype=torch.uint8), torch.tensor([2.0]), bits=2, levels=levels)
    assert weight.zero == 0 and dequantize_packed(weight).tolist() == [[-2.0, 2.0, 1.0, -0.5]]


@pytest.mark.parametrize("grid, dtype", [("zero", torch.float16), ("zero", torch.bfloat16), ("levels", torch.bfloat16)])
def test_large_weights_are_computed_in_fp32_and_cast_once(grid, dtype, generator):
    """Above the size from which the CPU compiles."""
    levels = torch.randn(16, generator=generator, device=DEVICE) if grid == "levels" else None
    codes = random_codes(300, 512, 4)
    scale = torch.rand(300, 4, generator=generator, device=DEVICE).to(dtype)
    weight = pack_weight(codes, scale, None if levels is not None else 7.3, bits=4, group_size=128, levels=levels)
    fields = codes.long().view(300, 4, 128)
    values = levels[fields] if levels is not None else fields.float() - 7.3
    want = (values * scale.float().unsqueeze(-1)).to(dtype).view(300, 512)
    assert torch.equal(dequantize_packed(weight, dtype), want)


@pytest.mark.parametrize("fmt", [IntFormat(b, signed=s) for b in BITS for s in (True, False)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_what_quantize_gives_packs_to_what_dequantize_gives(fmt, symmetric, group_size, generator):
    w = torch.randn(5, 96, generator=generator, device=DEVICE)
    granularity = PerChannel(0) if group_size is None else PerGroup(group_size)
    rows = w.view(-1, group_size or 96)
    grid = {"qmin": fmt.qmin, "qmax": fmt.qmax}
    scale, zero = choose_qparams(rows.amin(1), rows.amax(1), symmetric=symmetric, **grid)
    codes = quantize(w, scale, zero, granularity=granularity, **grid)
    weight = pack_weight(codes, scale, zero, bits=fmt.bits, group_size=group_size)
    assert isinstance(weight.zero, float) == symmetric
    assert torch.equal(dequantize_packed(weight), dequantize(codes, scale, zero, granularity=granularity))


def test_default_zero_is_the_middle_of_the_grid():
    scale = torch.ones(1)
    signed = pack_weight(torch.tensor([[-8, 0, 7]], dtype=torch.int8), scale, bits=4)
    unsigned = pack_weight(torch.tensor([[0, 8, 15]], dtype=torch.uint8), scale, bits=4)
    one_bit = pack_weight(torch.tensor([[0, 1]], dtype=torch.uint8), scale, bits=1)
    assert dequantize_packed(signed).tolist() == dequantize_packed(unsigned).tolist() == [[-8.0, 0.0, 7.0]]
    assert dequantize_packed(one_bit).tolist() == [[-0.5, 0.5]]


def test_one_scale_for_all_is_given_to_every_group():
    weight = pack_weight(random_codes(3, 8, 4), torch.tensor([0.5], device=DEVICE), bits=4, group_size=4)
    assert weight.scale.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("layout, levels", [("canonical", False), ("planar", True)])
def test_a_compiled_or_exported_graph_holds_the_same_values(layout, levels, generator):
    table = torch.randn(16, generator=generator, device=DEVICE) if levels else None
    weight = weight_of(n=7, k=160, group_size=32, layout=layout, levels=table)

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codes, self.scale = torch.nn.Buffer(weight.codes), torch.nn.Buffer(weight.scale)

        def forward(self, x):
            return x @ dequantize_packed(replace(weight, codes=self.codes, scale=self.scale)).T

    eye = torch.eye(160, device=DEVICE)
    want = dequantize_packed(weight).T
    exported = torch.export.export(Linear(), (eye,), dynamic_shapes=({0: torch.export.Dim("m")},)).module()
    compiled = torch.compile(Linear(), fullgraph=True, backend="aot_eager")
    assert torch.equal(exported(eye), want) and torch.equal(compiled(eye), want)
    packed = torch.compile(pack_codes, fullgraph=True, backend="aot_eager")(random_codes(7, 160, 4), 4, layout)
    assert torch.equal(packed, weight.codes)


def test_nbytes_counts_every_part():
    weight = weight_of(n=6, k=64, bits=2, group_size=16, zero=torch.arange(24.0).view(6, 4).half())
    assert weight.nbytes == 6 * 16 + 24 * 4 + 24 * 2


STATES = {
    "number": {"bits": 2, "zero": 1.5},
    "zero": {"bits": 4, "zero": torch.arange(24.0).view(6, 4).bfloat16()},
    "levels": {"bits": 4, "levels": torch.linspace(-1, 1, 16)},
    "planar": {"bits": 1, "layout": "planar"},
}


@pytest.mark.parametrize("kind", STATES)
def test_state_passes_through_json_and_back_bit_for_bit(kind):
    weight = weight_of(**STATES[kind])
    tensors, metadata = to_tensors(weight)
    back = from_tensors(tensors, json.loads(json.dumps(metadata)), layout=weight.layout)
    assert parts(back) == parts(weight)
    assert back.scale.dtype == weight.scale.dtype and same_bits(back.codes, weight.codes)


def test_state_is_canonical_and_says_what_it_is():
    tensors, metadata = to_tensors(weight_of(layout="planar"))
    assert metadata == {
        "format": "golden-stick-packed",
        "version": 1,
        "bits": 4,
        "shape": [6, 64],
        "group_size": 16,
        "zero": 8.0,
    }
    assert sorted(tensors) == ["codes", "scale"] and tensors["codes"].shape == (6, 32)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 3}, "version of fc must be at most 2, got 3; a newer golden-stick wrote it: upgrade"),
        ({"version": 0}, "version of fc must be at least 1"),
        ({"version": "1"}, "version of fc must be int, got '1'"),
        ({"format": "gguf"}, "format of fc must be 'golden-stick-packed', got 'gguf'"),
        ({"bits": True}, "bits of fc must be int, got True"),
        ({"bits": 3}, "bits must be one of 1, 2, 4, 8, got 3"),
        ({"shape": [6]}, "shape of fc must be two integers"),
        ({"shape": [6, 66]}, r"fc.codes must have shape \[6, 33\].*truncated: 192 of 198 bytes"),
        ({"group_size": 24}, "fc: K must be a multiple of group_size, got K=64, group_size=24; .*group_size=8"),
        ({"zero": NAN}, "fc.zero must be finite, got nan"),
        ({"zero": None}, "zero of fc must be int or float, got None"),
        ({"colour": 1}, "metadata of fc must have .*, got .*colour"),
    ],
)
def test_damaged_metadata_is_refused(change, words):
    tensors, metadata = to_tensors(weight_of())
    with pytest.raises(ValueError, match=words):
        from_tensors(tensors, metadata | change, name="fc")


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"scale": None}, ValueError, "tensors of fc must be codes, scale .*, got codes"),
        ({"bias": torch.ones(6)}, ValueError, "got bias, codes, scale"),
        ({"codes": torch.zeros(6, 31, dtype=torch.uint8)}, ValueError, r"fc.codes .*\(truncated: 186 of 192 bytes\)"),
        ({"codes": torch.zeros(6, 33, dtype=torch.uint8)}, ValueError, r"\(198 bytes where 192 belong\)"),
        ({"codes": torch.zeros(6, 32)}, TypeError, "fc.codes must be uint8, got float32"),
        ({"scale": torch.ones(6)}, ValueError, r"fc.scale must have shape \[6, 4\], got \[6\]"),
        ({"scale": torch.ones(6, 4).double()}, TypeError, "fc.scale must be float32 / float16 / bfloat16, got float64"),
        ({"scale": torch.full((6, 4), INF)}, ValueError, r"fc.scale must be finite, got inf at \[0, 0\]"),
        ({"zero": torch.full((6, 4), NAN)}, ValueError, "metadata of fc must have"),
    ],
)
def test_damaged_tensors_are_refused(change, error, words):
    tensors, metadata = to_tensors(weight_of())
    tensors = {k: t for k, t in (tensors | change).items() if t is not None}
    with pytest.raises(error, match=words):
        from_tensors(tensors, metadata, name="fc")


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"layout": "tiled"}, ValueError, "layout must be one of canonical, planar, got 'tiled'"),
        ({"layout": "planar"}, TypeError, "weight.codes must be int16, got uint8"),
        ({"shape": (0, 64)}, ValueError, r"shape must be \(N, K\) with N, K >= 1, got \(0, 64\)"),
        ({"group_size": 0}, ValueError, "K must be a multiple of group_size, got K=64, group_size=0"),
        ({"zero": torch.zeros(6, 1)}, ValueError, r"weight.zero must have shape \[6, 4\], got \[6, 1\]"),
        ({"zero": torch.zeros(6, 4, dtype=torch.uint8)}, TypeError, "weight.zero must be float32 / .*, got uint8"),
        ({"zero": "8"}, TypeError, "weight.zero must be a tensor or a number, got str"),
        ({"levels": torch.zeros(8)}, ValueError, r"weight.levels must have shape \[16\], got \[8\]"),
        ({"levels": torch.zeros(16)}, ValueError, "weight.zero must be 0 with levels, got 8.0; subtract it"),
        ({"scale": torch.ones(6, 4, device="meta")}, ValueError, "weight.scale must be on the device of the codes"),
        ({"scale": [1.0]}, TypeError, "weight.scale must be a tensor, got list"),
    ],
)
def test_weights_whose_parts_do_not_fit_are_refused(change, error, words):
    weight = weight_of().to("cpu")
    check_packed("op", weight)
    with pytest.raises(error, match=rf"^op: .*{words}|^op: {words}"):
        check_packed("op", replace(weight, **change))


@pytest.mark.parametrize(
    "part, new, words",
    [
        ("codes", torch.zeros(6, 16, dtype=torch.uint8), r"op: weight.codes must have shape .*\(truncated: 96 of 192"),
        ("codes", torch.zeros(6, 32, dtype=torch.int8), "op: weight.codes must be uint8, got int8"),
        ("scale", torch.ones(6, 1), r"op: weight.scale must have shape \[6, 4\], got \[6, 1\]"),
        ("scale", torch.ones(6, 4).double(), "op: weight.scale must be float32 / float16 / bfloat16, got float64"),
        ("zero", torch.ones(4, 6), r"op: weight.zero must have shape \[6, 4\], got \[4, 6\]"),
    ],
)
def test_a_weight_that_was_right_is_refused_when_a_tensor_of_it_is_no_more(part, new, words):
    weight = replace(weight_of().to("cpu"), zero=torch.full((6, 4), 7.5))
    check_packed("op", weight)
    before = getattr(weight, part).data
    getattr(weight, part).data = new
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=words):
            check_packed("op", weight)
    getattr(weight, part).data = before
    check_packed("op", weight)


def test_a_weight_that_was_right_says_nothing_of_its_copies():
    weight = weight_of().to("cpu")
    check_packed("op", weight)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        check_packed("op", other)
        with pytest.raises(ValueError, match=r"op: weight\.scale must have shape"):
            check_packed("op", replace(other, scale=torch.ones(6, 1)))


def test_what_is_no_packed_weight_is_refused():
    with pytest.raises(TypeError, match="repack: weight must be a PackedWeight, got Tensor; use pack_weight"):
        repack(torch.zeros(2), "planar")


def test_values_that_no_computation_survives_are_refused_by_place():
    scale = torch.ones(6, 4)
    scale[2, 3] = -INF
    weight = replace(weight_of(k=60, group_size=15).to("cpu"), scale=scale)
    with pytest.raises(ValueError, match=r"load: fc.scale must be finite, got -inf at \[2, 3\]"):
        check_packed_values("load", weight, "fc")
    check_packed_values("load", replace(weight, scale=-torch.ones(6, 4)), "fc")


def test_bits_behind_the_last_code_are_refused():
    codes = torch.tensor([[0x21], [0x43]], dtype=torch.uint8)
    weight = PackedWeight(codes, torch.ones(2, 1), 8.0, None, 4, (2, 1), 1)
    with pytest.raises(ValueError, match=r"fc\.codes must be 0 behind the last of 1 codes, got last byte 33 in row 0"):
        check_packed_values("load", weight, "fc")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda c: pack_codes(c, 3), ValueError, "pack_codes: bits must be one of 1, 2, 4, 8, got 3"),
        (lambda c: pack_codes(c, 4, "x"), ValueError, "pack_codes: layout must be one of canonical, planar, got 'x'"),
        (lambda c: pack_codes(c.float(), 4), TypeError, "codes must be a uint8 tensor, got float32"),
        (lambda c: pack_codes(c[0], 4), ValueError, r"codes must be \[N, K\] with N, K >= 1, got \[6\]"),
        (lambda c: pack_codes(c[:0], 4), ValueError, r"got \[0, 6\]"),
        (lambda c: pack_codes(c + 16, 4), ValueError, r"codes must be in 0\.\.15 for 4 bits, got 21"),
        (lambda c: unpack_codes(c, 4, (2, 13)), ValueError, r"packed must have shape \[2, 7\]"),
        (lambda c: unpack_codes(c, 4, (2, 12), "planar"), TypeError, "packed must be int16, got uint8"),
        (lambda c: pack_weight(c.int(), torch.ones(2), bits=4), TypeError, "codes must be an int8 or uint8 tensor"),
        (lambda c: pack_weight(c.char() + 3, torch.ones(2), bits=4), ValueError, r"in -8\.\.7 for 4 bits, got 3\.\.8"),
        (lambda c: pack_weight(c, torch.ones(3), bits=4), ValueError, r"scale must have shape \[2, 1\] or \[2\]"),
        (lambda c: pack_weight(c, torch.ones(2), torch.ones(2).int(), bits=4), TypeError, "zero must be a float32 / "),
        (lambda c: pack_weight(c, torch.ones(2), NAN, bits=4), ValueError, "weight.zero must be finite, got nan"),
        (lambda c: pack_weight(c, torch.ones(2), bits=4, group_size=4), ValueError, "got K=6, group_size=4; pad K or"),
        (lambda c: pack_weight(c.char(), torch.ones(2), bits=4, levels=torch.ones(16)), TypeError, "must be uint8 wi"),
        (lambda c: dequantize_packed(pack_weight(c, torch.ones(2), bits=4), torch.int8), TypeError, "dtype must be"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    codes = torch.arange(6, dtype=torch.uint8).repeat(2, 1)
    with pytest.raises(error, match=words):
        call(codes)


def test_packing_needs_little_memory_beyond_its_result():
    """512 x 4096 codes: 2 MiB of codes, 1 MiB packed; temporaries stay below another 2 MiB."""
    codes = random_codes(512, 4096, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        for layout in LAYOUTS:
            unpack_codes(pack_codes(codes, 4, layout), 4, (512, 4096), layout)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak <= math.prod(codes.shape) * 2.6
