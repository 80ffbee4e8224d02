"""4-bit floats as a scheme of weights: what is rounded to what, what is stored, and what refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import PTQ, SLB, PackedEmbedding, PackedLinear, SimQAT, plan_weights, quantize_weights
from gs_algos.quant.packed.float_grid import nearest_values
from gs_algos.quant.packed.grid import grid_of
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels import dequantize_packed, pack_weight, qmatmul, repack
from gs_kernels.formats import E2M1
from gs_kernels.pack.formats.fp4 import from_mx_blocks
from gs_kernels.pack.serialize import from_tensors, to_tensors
from tests.helpers import relative_rms, same_bits

NAMES = ["mxfp4", "nvfp4"]


def weight(n: int = 24, k: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "mxfp4:mse", "nvfp4:minmax"])
def test_the_text_of_a_scheme_is_read_back(text: str):
    scheme = Scheme.parse(text, "weight")
    assert scheme.is_float and scheme.bits == 4 and Scheme.parse(str(scheme), "weight") == scheme


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mxfp4:percentile", "mxfp4 takes at most one of minmax, mse"),
        ("mxfp4@group:32", "must look like .* or mxfp4|nvfp4"),
        ("mxfp6", "must look like .* or mxfp4|nvfp4"),
        ("fp8@channel", "must look like"),
    ],
)
def test_other_floats_are_refused(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        Scheme.parse(text, "weight")


def test_values_between_two_go_to_the_nearest_and_ties_to_the_even_mantissa():
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 2.51, 3.5, 5.0, 5.01, 100.0, -0.75, -5.0])
    want = [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, -1.0, -4.0]
    assert nearest_values(x).tolist() == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-37, 0.05, 1e30])
def test_scales_and_codes_are_those_of_compressed_tensors(name: str, scale: float):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")
    from compressed_tensors.quantization import preset_name_to_scheme, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if name == "nvfp4" and scale != 0.05:
        pytest.skip("the library's divisor overflows")
    w = weight() * (scale / 0.05)
    args = preset_name_to_scheme(f"{name.upper()}A16", ["Linear"]).weights
    divisor = generate_gparam(w.min(), w.max()) if name == "nvfp4" else None
    groups = w.view(24, -1, args.group_size)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, divisor)
    ours = grid_of(w, Scheme.parse(name, "weight"))
    assert torch.equal(ours.scale, theirs if divisor is None else theirs / divisor)
    values = quantize(w, theirs, None, args, global_scale=divisor)
    assert torch.equal(torch.tensor(E2M1)[ours.codes(w).int()], values)


@pytest.mark.parametrize("name", NAMES)
def test_least_squares_is_no_worse_than_the_largest_weight_in_any_group(name: str):
    w, size = weight(200), 32 if name == "mxfp4" else 16
    errors = [
        (dequantize_packed(round_to_nearest(w, f"{name}:{how}")) - w).view(-1, size).square().sum(1)
        for how in ("mse", "minmax")
    ]
    assert bool((errors[0] <= errors[1]).all()) and errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_zeros_stay_zeros_and_tiny_ones_keep_a_scale(name: str):
    w = weight()
    w[3], w[4] = 0.0, w[4] * 1e-9
    packed = round_to_nearest(w, name)
    assert not dequantize_packed(packed)[3].any()
    assert bool((packed.real_scale() > 0).all())
    assert not dequantize_packed(round_to_nearest(torch.zeros(2, 64), name)).any()


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_scales_of_8_bits_and_come_back_with_the_same_bits(name: str):
    packed = round_to_nearest(weight(), name)
    tensors, metadata = to_tensors(packed)
    assert tensors["scale"].itemsize == 1 and metadata["version"] == 2
    back = from_tensors(tensors, metadata, "planar")
    assert same_bits(dequantize_packed(back), dequantize_packed(packed))
    assert packed.nbytes == sum(t.nbytes for t in tensors.values())


def test_a_scale_that_is_not_a_number_is_refused():
    tensors, metadata = to_tensors(round_to_nearest(weight(), "mxfp4"))
    tensors["scale"][2, 1] = 255
    with pytest.raises(ValueError, match=r"weight.scale must be finite, got nan at \[2, 1\]"):
        from_tensors(tensors, metadata)
    blocks = torch.zeros(3, 2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"exponents below 255, which is NaN, got 255 at \[1, 0\]"):
        from_mx_blocks(blocks, torch.tensor([[1, 2], [255, 3], [4, 5]], dtype=torch.uint8))


def test_other_levels_beside_8_bit_scales_are_refused():
    codes, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1).to(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="levels must be those of e2m1"):
        pack_weight(codes, scale, bits=4, levels=torch.arange(16.0))
    with pytest.raises(ValueError, match="divisor must come with scales of float8_e4m3fn"):
        pack_weight(codes, scale.float().to(torch.float8_e4m3fn), bits=4, levels=torch.tensor(E2M1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_products_are_those_of_the_real_values(name: str, m: int):
    packed, x = round_to_nearest(weight(50, 96), name), torch.randn(m, 96)
    want = x.double() @ dequantize_packed(packed).double().T
    for one in (packed, repack(packed, "planar")):
        assert relative_rms(qmatmul(x, one).double(), want) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_packed_as_planned_saved_and_loaded(name: str, tmp_path: Path):
    model = nn.Sequential(nn.Embedding(20, 64), net())
    plan = plan_weights(model, name, embeddings=name)
    quantize_weights(model, name, embeddings=name)
    held = sum(t.nbytes for t in model.state_dict().values())
    assert held == plan.totals.after
    assert isinstance(model[0], PackedEmbedding) and isinstance(model[1][0], PackedLinear)
    ids = torch.tensor([3, 19])
    want = model(ids)
    gs_algos.save(model, tmp_path / "saved")
    again = gs_algos.load(tmp_path / "saved", lambda: nn.Sequential(nn.Embedding(20, 64), net()))
    assert same_bits(again(ids), want)
    stored = again.half()[1][0].packed  # codes and scales keep their dtypes
    assert same_bits(dequantize_packed(stored), dequantize_packed(model[1][0].packed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_calibration_lowers_the_error_of_the_output(name: str, rounding: str, tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=generator)
    data = [torch.randn(128, 64, generator=generator) @ mix for _ in range(3)]
    plain, model = net(), net()
    want = plain(data[0])
    quantize_weights(plain, name)
    algo = PTQ(weight=name, rounding=rounding)
    algo.apply(model, data[0])
    algo.calibrate(model, data, journal=tmp_path / "journal")
    gs_algos.save(model, tmp_path / "prepared")
    converted = algo.convert(model)
    assert relative_rms(converted(data[0]), want) < 0.95 * relative_rms(plain(data[0]), want)
    resumed = gs_algos.load(tmp_path / "prepared", net)
    again = PTQ.resume(resumed).convert(resumed, data[0])
    assert same_bits(again(data[0]), converted(data[0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SimQAT(weight="mxfp4"), "SimQAT: weight must be integers, got 'mxfp4'"),
        (lambda: SimQAT(rules=[("0", {"weight": "nvfp4"})]), "rule 0: weight must be integers"),
        (lambda: SimQAT(act="mxfp4"), "activations are rounded to integers"),
        (lambda: SLB(weight="mxfp4"), "SLB: weight must have levels that lie evenly around 0"),
        (lambda: PTQ(weight="mxfp4", act="int8@tensor"), "PTQ: weight must be integers"),
        (lambda: PTQ(weight="mxfp4", rounding="signround").plan(net(), torch.randn(2, 64)), "by nearest or gptq"),
        (lambda: PTQ(weight="nvfp4", act="int8@token").plan(net(), torch.randn(2, 64)), "read floats, got nvfp4"),
        (
            lambda: plan_weights(nn.Sequential(nn.Linear(40, 8)), "mxfp4"),
            r"groups of 32 must divide the 40 inputs .*int8@channel",
        ),
    ],
)
def test_what_cannot_have_them_refuses_them(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()
