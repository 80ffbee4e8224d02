"""Layers with packed weights: what they compute, what they store, and that nothing done to a module spoils it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import PackedEmbedding, PackedLinear
from gs_algos.quant.packed import module as packed_module
from gs_algos.quant.packed.module import PackedFormat, tensors_of
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.quant.ranges import search_range
from gs_algos.quant.scheme import Scheme
from gs_kernels import PackedWeight, PerChannel, choose_qparams, fake_quant
from tests.helpers import relative_rms, same_bits

SCHEMES = (
    "int8@group:32",
    "int4@group:16:asym",
    "uint4@channel:asym",
    "int2@tensor:mse",
    "int1@group:8",
    "int1@group:8:asym",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int = 10, k: int = 32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(k, n, bias)
    with torch.no_grad():
        layer.weight.copy_(random(n, k))
        if bias:
            layer.bias.copy_(random(n, seed=1))
    return layer


def values(weight: PackedWeight) -> Tensor:
    """(code - zero) * scale of a canonical weight, field by field."""
    n, k = weight.shape
    fields = [(weight.codes >> shift) & (2**weight.bits - 1) for shift in range(0, 8, weight.bits)]
    codes = torch.stack(fields, 2).view(n, -1)[:, :k].float().view(n, -1, weight.group_size)
    zero = weight.zero.float()[..., None] if isinstance(weight.zero, Tensor) else weight.zero
    return ((codes - zero) * weight.scale.float()[..., None]).view(n, k)


@pytest.fixture(params=[("cuda",), ("cpu", "cuda")], ids=["canonical", "planar"])
def kernel_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers hold the layout of a CPU, or on the CPU that of a GPU."""
    monkeypatch.setattr(packed_module, "KERNEL_DEVICES", request.param)


def test_the_largest_weight_of_a_group_takes_the_lowest_level_whatever_its_sign():
    weight = torch.tensor([[8.0, -4.0, 2.4, -2.6, 0.0, 1.0, 3.0, -5.0]])
    packed = round_to_nearest(torch.cat((weight, -weight)), "int4@group:8")
    assert (packed.scale.tolist(), packed.zero) == ([[-1.0], [1.0]], 8.0)
    want = torch.tensor([[8.0, -4.0, 2.0, -3.0, 0.0, 1.0, 3.0, -5.0]])
    assert values(packed).tolist() == torch.cat((want, -want)).tolist()
    assert packed.codes.tolist() == [[0xC0, 0xB6, 0x78, 0xD5], [0xC0, 0xB6, 0x78, 0xD5]]


def test_a_group_that_reaches_as_far_on_both_sides_takes_the_grid_of_a_range():
    weight = torch.tensor([[7.5, -7.5, 2.4, -2.6, 0.0, 0.5, 1.5, -0.5]])
    packed = round_to_nearest(weight, "int4@group:8")
    assert packed.scale.tolist() == [[-1.0]]
    assert values(packed).tolist() == [[8.0, -7.0, 2.0, -3.0, 0.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("scheme", ["int2@group:32", "int4@group:32", "int4@group:32:mse"])
def test_the_sign_of_a_scale_takes_error_away(scheme: str):
    weight = random(64, 64)
    grouped = weight.view(-1, 32)
    low, high = search_range(grouped, Scheme.parse(scheme, "weight"))
    bits = int(scheme[3])
    scale, zero = choose_qparams(low, high, qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1, symmetric=True)
    limits = {"qmin": -(2 ** (bits - 1)), "qmax": 2 ** (bits - 1) - 1}
    plain = fake_quant(grouped, scale, zero, **limits, granularity=PerChannel(0)).view_as(weight)
    ours = (values(round_to_nearest(weight, scheme)) - weight).square().sum()
    assert float(ours) < 0.97 * float((plain - weight).square().sum())


def test_one_bit_takes_the_values_of_least_squares():
    weight = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 6.0, 7.0]])
    assert values(round_to_nearest(weight, "int1@channel")).tolist() == [[2, -2, 2, -2], [0, 0, 0, 0], [4, 4, 4, 4]]
    asymmetric = values(round_to_nearest(weight, "int1@channel:asym"))
    want = torch.tensor([[1.5, -2.5, 1.5, -2.5], [0.0] * 4, [1.5, 1.5, 6.5, 6.5]])
    torch.testing.assert_close(asymmetric, want, rtol=2**-11, atol=0)  # the zero point is stored in fp16


@pytest.mark.parametrize("constant", [0.75, -0.75])
def test_one_bit_asymmetric_keeps_a_constant_group(constant: float):
    assert values(round_to_nearest(torch.full((2, 8), constant), "int1@channel:asym")).unique().tolist() == [constant]


def test_one_bit_asymmetric_keeps_a_constant_group_whose_mean_rounds_up():
    constant = torch.full((1, 32), 0.25e-7)
    assert constant.mean() > constant[0, 0]
    torch.testing.assert_close(values(round_to_nearest(constant, "int1@channel:asym")), constant, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_storing_scales_in_16_bits_adds_no_error_of_its_own(dtype: torch.dtype):
    weight = random(64, 64).to(dtype)
    packed = round_to_nearest(weight, "int8@group:32")
    assert packed.scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    step = packed.scale.float().abs().repeat_interleave(32, 1)
    error = (values(packed) - weight.float()).abs()
    inside = weight.float().abs() <= 126 * step
    assert bool((error[inside] <= 0.5001 * step[inside]).all())
    assert bool((error <= 2.01 * step).all())  # at the clamped ends


def test_scales_too_small_for_fp16_are_stored_in_fp32():
    packed = round_to_nearest(random(8, 32) * 1e-7, "int4@group:32")
    assert packed.scale.dtype == torch.float32
    assert relative_rms(values(packed), random(8, 32) * 1e-7) < 0.2


def test_a_weight_in_many_pieces_is_the_weight_in_one(monkeypatch: pytest.MonkeyPatch):
    weight = random(13, 32)
    whole = round_to_nearest(weight, "int4@group:16:asym")
    monkeypatch.setattr("gs_algos.quant.packed.grid.CHUNK", 70)
    pieces = round_to_nearest(weight, "int4@group:16:asym")
    assert all(same_bits(getattr(whole, part), getattr(pieces, part)) for part in ("codes", "scale", "zero"))


@pytest.mark.parametrize(
    ("scheme", "error", "words"),
    [
        ("int3@channel", ValueError, "one of 1, 2, 4, 8, got int3.*use int4"),
        ("int4@group:24", ValueError, "group size must divide the 32 weights.*use group:8"),
        ("int4@channel:lsq", ValueError, "lsq needs training"),
    ],
)
def test_schemes_that_cannot_be_packed_are_refused(scheme: str, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        PackedLinear.from_linear(linear(), scheme)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float):
    layer = linear()
    layer.weight.data[3, 4] = value
    with pytest.raises(ValueError, match="must be finite"):
        PackedLinear.from_linear(layer, "int4@channel")


@pytest.mark.usefixtures("kernel_devices")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_multiplies_with_its_codes(scheme: str):
    layer = linear()
    packed = PackedLinear.from_linear(layer, scheme)
    x = random(2, 3, 32, seed=2).requires_grad_()
    weight = values(round_to_nearest(layer.weight, scheme))
    y = packed(x)
    assert relative_rms(y, F.linear(x, weight, layer.bias)) < 1e-6
    y.backward(random(2, 3, 10, seed=3))
    assert x.grad is not None
    assert relative_rms(x.grad, random(2, 3, 10, seed=3) @ weight) < 1e-6
    assert not any(p.requires_grad for p in packed.parameters())
    torch.testing.assert_close(packed.weight, weight, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernel_devices")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_reads_the_rows_that_are_asked_for(scheme: str):
    table = nn.Embedding(11, 32, padding_idx=3)
    packed = PackedEmbedding.from_embedding(table, scheme)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    torch.testing.assert_close(packed(ids), values(round_to_nearest(table.weight, scheme))[ids], rtol=0, atol=1e-6)
    assert packed(ids[:0]).shape == (0, 3, 32)
    assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (11, 32, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        packed(torch.tensor([11]))


@pytest.mark.usefixtures("kernel_devices")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_canonical_and_comes_back_bit_for_bit(scheme: str):
    source = round_to_nearest(random(10, 32), scheme)
    layer = PackedLinear.from_packed(source, random(10))
    state = layer.state_dict()
    parts = ("codes", "scale", "zero") if isinstance(source.zero, Tensor) else ("codes", "scale")
    assert set(state) == {"bias", *parts}
    assert all(same_bits(state[part], getattr(source, part)) for part in parts)
    other = PackedLinear.empty(PackedFormat.of(source), bias=True)
    other.load_state_dict(state)
    assert all(same_bits(a, b) for a, b in zip(other.buffers(), layer.buffers(), strict=True))
    x = random(4, 32)
    assert same_bits(other(x), layer(x))


@pytest.mark.usefixtures("kernel_devices")
def test_a_layer_on_the_meta_device_is_filled_by_assigning():
    source = PackedLinear.from_linear(linear(), "int4@group:16:asym")
    empty = PackedLinear.empty(PackedFormat.of(source.packed), bias=True, device="meta")
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(empty(random(4, 32)), source(random(4, 32)))


def test_scales_of_another_dtype_are_loaded_as_they_are():
    source = PackedLinear.from_packed(round_to_nearest(random(10, 32) * 1e-7, "int4@group:16"))
    target = PackedLinear.from_linear(linear(bias=False), "int4@group:16")
    assert (source.scale.dtype, target.scale.dtype) == (torch.float32, torch.float16)
    target.load_state_dict(source.state_dict())
    assert same_bits(target.scale, source.scale)


def test_a_float_state_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*codes.*Unexpected key.*weight"):
        PackedLinear.from_linear(linear(), "int4@group:16").load_state_dict(linear().state_dict())


def test_packed_bytes_of_another_size_are_refused():
    state = PackedLinear.from_linear(linear(), "int4@group:16").state_dict()
    state["codes"] = state["codes"][:, :-1]
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        PackedLinear.from_linear(linear(), "int4@group:16").load_state_dict(state)


@pytest.mark.usefixtures("kernel_devices")
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float(), lambda m: m.type(torch.half)],
)
def test_a_cast_changes_the_arithmetic_and_not_what_is_stored(cast: object):
    layer = PackedLinear.from_linear(linear(), "int4@group:16:asym")
    before = {name: t.clone() for name, t in tensors_of(layer.packed).items()}
    cast(layer)  # type: ignore[operator]
    assert all(same_bits(before[name], t) for name, t in tensors_of(layer.packed).items())
    assert layer.bias is not None
    assert layer.dtype == layer.bias.dtype == layer.weight.dtype
    assert layer(random(2, 32).to(layer.dtype)).dtype == layer.dtype


def test_a_cast_embedding_returns_rows_of_that_dtype():
    packed = PackedEmbedding.from_embedding(nn.Embedding(5, 32), "int8@channel").to(torch.bfloat16)
    assert packed(torch.tensor([1])).dtype == torch.bfloat16


def test_autocast_casts_x_as_a_linear_does():
    packed = PackedLinear.from_linear(linear(), "int8@channel")
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(random(2, 32)).dtype == linear()(random(2, 32)).dtype == torch.bfloat16


def test_a_layer_follows_every_change_of_its_tensors():
    layer, x = PackedLinear.from_linear(linear(), "int4@group:16:asym"), random(2, 32)
    other = PackedLinear.from_linear(linear(), "int4@group:16:asym")
    assert layer.packed is layer.packed
    y = layer(x)
    assert layer.scale is not None and layer.codes is not None
    layer.scale.mul_(2)  # in place
    twice = layer(x)
    layer.scale = layer.scale / 2  # another tensor
    assert same_bits(layer(x), y) and not same_bits(twice, y)
    layer.load_state_dict({**other.state_dict(), "scale": twice.new_full(layer.scale.shape, 0.5)}, assign=True)
    assert torch.equal(layer.packed.scale, torch.full_like(layer.scale, 0.5))


def test_a_layer_whose_tensor_was_damaged_after_a_call_is_refused():
    layer, x = PackedLinear.from_linear(linear(), "int4@group:16"), random(2, 32)
    layer(x)
    assert layer.codes is not None
    layer.codes.data = layer.codes.data[:, :3]
    with pytest.raises(ValueError, match=r"qmatmul: weight.codes must have shape .* \(truncated"):
        layer(x)


def test_a_bias_whose_data_was_replaced_is_read_anew():
    layer, x = PackedLinear.from_linear(linear(), "int4@group:16"), random(2, 32)
    layer(x)
    assert layer.bias is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer.bias.data = torch.zeros_like(layer.bias, dtype=dtype)
        without = layer(x)
        layer.bias.data = torch.full_like(layer.bias, 2)
        torch.testing.assert_close(layer(x), without + 2)
    layer.bias.data = torch.zeros(1)
    with pytest.raises(ValueError, match=r"qmatmul: bias must"):
        layer(x)


def test_a_copy_and_a_file_hold_a_layer_that_was_called_once():
    layer, x = PackedLinear.from_linear(linear(), "int4@group:16"), random(2, 32)
    fresh = len(pickle.dumps(layer))
    y = layer(x)
    assert len(pickle.dumps(layer)) == fresh
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_bits(other(x), y)
        other.scale.zero_()
        assert not same_bits(other(x), y) and same_bits(layer(x), y)


@pytest.mark.usefixtures("kernel_devices")
def test_a_tied_head_has_no_tensors_of_its_own():
    table = PackedEmbedding.from_embedding(nn.Embedding(11, 32), "int4@group:16")
    net = nn.Sequential(table, PackedLinear.from_packed(table))
    for twin in (net, copy.deepcopy(net), copy.deepcopy(net).to(torch.bfloat16)):
        embedding, head = twin
        assert set(twin.state_dict()) == {"0.codes", "0.scale"}
        assert head.tied
        assert head.packed.codes.data_ptr() == embedding.codes.data_ptr()
        assert (head.nbytes, embedding.nbytes) == (0, embedding.packed.nbytes)
        ids = torch.tensor([1, 7])
        assert relative_rms(twin(ids), embedding(ids).float() @ embedding.weight.float().T) < 1e-2


def test_a_layer_exports_with_its_packed_bytes():
    layer = PackedLinear.from_linear(linear(), "int4@group:16")
    program = torch.export.export(layer, (random(3, 32),))
    assert {name: t.dtype for name, t in program.state_dict.items()}["codes"] == torch.uint8
    assert relative_rms(program.module()(random(3, 32)), layer(random(3, 32))) < 1e-6


def test_repr_says_what_is_stored():
    table = PackedEmbedding.from_embedding(nn.Embedding(11, 32), "int8@group:16:asym")
    assert repr(table) == "PackedEmbedding(11, 32, bits=8, group_size=16, zero per group)"
    head = "in_features=32, out_features=11, bias=False, bits=8, group_size=16, zero per group, tied"
    assert repr(PackedLinear.from_packed(table)) == f"PackedLinear({head})"


def test_an_embedding_that_changes_rows_as_they_are_read_is_refused():
    with pytest.raises(ValueError, match=r"max_norm must be None, got 1\.0"):
        PackedEmbedding.from_embedding(nn.Embedding(11, 32, max_norm=1.0))
