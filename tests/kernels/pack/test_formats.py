"""Packed weights against the packers of other libraries: run here where they are light, else words that they made."""

import base64
import json
import types
from pathlib import Path

import pytest
import torch

from gs_kernels import PackedWeight, dequantize_packed, pack_weight, repack, unpack_codes
from gs_kernels.pack.formats.awq import from_awq, to_awq
from gs_kernels.pack.formats.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from gs_kernels.pack.formats.gptq import from_gptq, to_gptq
from gs_kernels.pack.formats.onnxruntime import from_matmul_nbits, to_matmul_nbits

VECTORS = json.loads((Path(__file__).parent / "pack_vectors.json").read_text())


def recorded(kind, part, *shape, dtype=torch.int32):
    return torch.frombuffer(bytearray(base64.b64decode(VECTORS[kind][part])), dtype=dtype).view(shape)


def formula(n, k, bits, groups, lowest=1):
    """The codes, scales and zero points from which the recorded words were made."""
    i, j, g = torch.arange(n)[:, None], torch.arange(k)[None], torch.arange(groups)[None]
    codes = (i * i * 7 + j * 5 + i * j * 3 + j // 9) % 2**bits
    scale = 2.0 ** -((i + 3 * g) % 5 + 1)
    zero = lowest + (i * 3 + g * 5) % (2**bits - 1)
    return codes.to(torch.uint8), scale, zero.float()


def weight_of(n=32, k=64, bits=4, group_size=32, zero=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group_size, generator=generator) + 0.1
    if zero == "asymmetric":
        zero = torch.randint(1, 2**bits, scale.shape, generator=generator).float()
    return pack_weight(codes, scale, zero, bits=bits, group_size=group_size)


def assert_same(got, want):
    assert (got.bits, got.shape, got.group_size, got.layout) == (want.bits, want.shape, want.group_size, want.layout)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scale, want.scale)
    assert torch.equal(torch.as_tensor(got.zero), torch.as_tensor(want.zero))


# compressed-tensors


def compressor_and_scheme(bits, strategy, symmetric, group_size=None):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, strategy=strategy, symmetric=symmetric, group_size=group_size, type="int")
    return PackedQuantizationCompressor, QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, n, k, group_size", [("group", 13, 96, 32), ("channel", 5, 50, None)])
def test_weights_that_compressed_tensors_packed(bits, symmetric, strategy, n, k, group_size):
    compressor, scheme = compressor_and_scheme(bits, strategy, symmetric, group_size)
    generator = torch.Generator().manual_seed(bits)
    groups, half = k // (group_size or k), 2 ** (bits - 1)
    state = {
        "weight": torch.randn(n, k, generator=generator),
        "weight_scale": torch.rand(n, groups, generator=generator) / half + 0.01,
        "weight_zero_point": torch.randint(-half, half, (n, groups), generator=generator).to(torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    packed = compressor.compress(state, scheme)
    want = compressor.decompress(packed, scheme)["weight"]
    got = from_compressed_tensors(packed, bits=bits)
    assert got.group_size == (group_size or k) and isinstance(got.zero, float) == symmetric
    assert torch.equal(dequantize_packed(got), want)
    exported, args = to_compressed_tensors(got)
    assert args == {k: v for k, v in scheme.weights.model_dump().items() if k in args}
    assert exported.keys() == packed.keys() and all(torch.equal(exported[key], packed[key]) for key in packed)


@pytest.mark.parametrize("zero", [8, 3, "asymmetric"])
@pytest.mark.parametrize("n, k, group_size", [(9, 64, 16), (3, 37, 37)])
def test_compressed_tensors_unpacks_what_we_export(zero, n, k, group_size):
    weight = weight_of(n, k, 4, group_size, zero)
    tensors, args = to_compressed_tensors(repack(weight, "planar"))
    compressor, scheme = compressor_and_scheme(4, args["strategy"], args["symmetric"], args["group_size"])
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], dequantize_packed(weight))
    assert_same(from_compressed_tensors(tensors, bits=4), weight)


def test_one_scale_for_a_whole_tensor_of_compressed_tensors():
    compressor, scheme = compressor_and_scheme(4, "tensor", False)
    weight = torch.linspace(-1, 1, 3 * 10).view(3, 10)
    state = {"weight": weight, "weight_scale": torch.tensor([0.15]), "weight_zero_point": torch.tensor([-2]).char()}
    packed = compressor.compress(state, scheme)
    got = from_compressed_tensors(packed, bits=4)
    assert got.zero == 6.0 and got.scale.shape == (3, 1)
    assert torch.equal(dequantize_packed(got), compressor.decompress(packed, scheme)["weight"])


# GPTQ


def gptq_vectors(bits, version):
    qzeros = recorded(f"gptq{bits}", f"qzeros_v{version}", 2, bits)
    return {"qweight": recorded(f"gptq{bits}", "qweight", bits, 32), "qzeros": qzeros}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_words_of_gptq_and_back(bits, version):
    codes, scale, zero = formula(32, 32, bits, 2)
    tensors = gptq_vectors(bits, version) | {"scales": scale.T}
    weight, order = from_gptq(tensors, bits=bits, group_size=16, version=version)
    assert order is None
    assert torch.equal(unpack_codes(weight.codes, bits, (32, 32)), codes)
    assert torch.equal(weight.scale, scale) and torch.equal(weight.zero, zero)
    back = to_gptq(weight, version=version)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert back["g_idx"].tolist() == [0] * 16 + [1] * 16 and back["g_idx"].dtype == torch.int32
    assert_same(from_gptq(back, bits=bits, group_size=16, version=version)[0], weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_in_version_1_are_read_as_their_writer_meant(bits):
    _, scale, zero = formula(32, 32, bits, 2, lowest=0)
    qzeros = recorded(f"gptq{bits}", "qzeros_v1_from_0", 2, bits)
    tensors = {"qweight": recorded(f"gptq{bits}", "qweight", bits, 32), "qzeros": qzeros, "scales": scale.T}
    weight, _ = from_gptq(tensors, bits=bits, group_size=16, version=1)
    assert zero.min() == 0 and torch.equal(weight.zero, zero)
    with pytest.raises(ValueError, match=r"fc must be at least 1 in version 1, got 0, .*; use version=2"):
        to_gptq(weight, version=1, name="fc")


def test_act_order_computes_what_gptq_computes_on_reordered_inputs():
    _, scale, _ = formula(32, 32, 4, 2)
    parts = {"qweight": (4, 32), "qzeros_v1": (2, 4), "g_idx": (32,)}
    tensors = {part.removesuffix("_v1"): recorded("gptq_act_order", part, *shape) for part, shape in parts.items()}
    weight, order = from_gptq(tensors | {"scales": scale.T}, bits=4, group_size=16)
    assert order is not None and order.tolist() != list(range(32))
    x = (torch.arange(32)[None] % 11 - 5.0) / 4
    y = recorded("gptq_act_order", "y", 1, 32, dtype=torch.float32)
    assert torch.equal(x[:, order] @ dequantize_packed(weight).T, y)


def test_symmetric_gptq_has_one_zero_for_all():
    weight = weight_of(zero=8)
    assert from_gptq(to_gptq(weight), bits=4, group_size=32)[0].zero == 8.0
    assert to_gptq(weight)["qzeros"].unique().tolist() == [0x77777777]
    per_row = weight_of(group_size=64)
    assert_same(from_gptq(to_gptq(per_row, version=2), bits=4, group_size=-1, version=2)[0], per_row)


def test_a_last_group_that_is_not_full_is_read_as_smaller_groups():
    scales = torch.tensor([[1.0, 2.0, 4.0]]).T.repeat(1, 32)  # [3, 32], groups of 32, 32 and 16 of K = 80
    tensors = {"qweight": torch.full((10, 32), 0x11111111), "qzeros": torch.zeros(3, 4), "scales": scales}
    tensors = {key: t.int() if key != "scales" else t for key, t in tensors.items()}
    weight, _ = from_gptq(tensors, bits=4, group_size=32, version=2)
    assert weight.group_size == 16
    assert dequantize_packed(weight)[5].tolist() == [1.0] * 32 + [2.0] * 32 + [4.0] * 16


# AWQ


def test_words_of_awq_and_back():
    codes, scale, zero = formula(32, 32, 4, 2, lowest=0)
    tensors = {
        "qweight": recorded("awq", "qweight", 32, 4),
        "qzeros": recorded("awq", "qzeros", 2, 4),
        "scales": scale.T,
    }
    weight = from_awq(tensors)
    assert torch.equal(unpack_codes(weight.codes, 4, (32, 32)), codes)
    assert torch.equal(weight.scale, scale) and torch.equal(weight.zero, zero)
    back = to_awq(repack(weight, "planar"))
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


# ONNX Runtime


def run_matmul_nbits(tensors, attributes, x):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the dev extra")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; it is in the dev extra")
    import onnxruntime

    names = ["x", *tensors]
    initializers = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()]
    node = onnx.helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    kinds = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", size])
        for name, size in (("x", attributes["K"]), ("y", attributes["N"]))
    ]
    graph = onnx.helper.make_graph([node], "g", kinds[:1], kinds[1:], initializers)
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k, block_size, group_size", [(96, 32, 32), (80, 32, 16), (20, 32, 20)])
def test_weights_that_onnx_runtime_quantized(bits, symmetric, k, block_size, group_size):
    state = pytest.importorskip("onnxruntime.capi._pybind_state", reason="onnxruntime is not installed")
    n, blocks = 6, -(-k // block_size)
    w = torch.randn(k, n, generator=torch.Generator().manual_seed(k))
    tensors = {
        "B": torch.zeros(n, blocks, block_size * bits // 8, dtype=torch.uint8),
        "scales": torch.zeros(n * blocks),
        "zero_points": torch.zeros(n * -(-blocks * bits // 8), dtype=torch.uint8),
    }
    arrays = [tensors["B"].numpy(), w.numpy(), tensors["scales"].numpy(), tensors["zero_points"].numpy()]
    getattr(state, f"quantize_matmul_{bits}bits")(*arrays, block_size, n, k, symmetric)
    if symmetric:
        del tensors["zero_points"]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
    weight = from_matmul_nbits(tensors, attributes)
    assert weight.group_size == group_size
    y = run_matmul_nbits(tensors, attributes, torch.eye(k))
    torch.testing.assert_close(y.T, dequantize_packed(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bits, k, group_size, zero, block_size",
    [
        (2, 96, 48, "asymmetric", 16),
        (2, 1024, 512, 1.5, 256),
        (4, 96, 32, None, 32),
        (4, 128, 64, "asymmetric", 64),
        (4, 300, 300, 7.25, 128),
        (4, 20, 20, 3, 32),
        (8, 72, 72, "asymmetric", 128),
    ],
)
def test_onnx_runtime_computes_with_what_we_export(bits, k, group_size, zero, block_size):
    weight = weight_of(7, k, bits, group_size, zero)
    tensors, attributes = to_matmul_nbits(repack(weight, "planar"))
    assert attributes == {"K": k, "N": 7, "bits": bits, "block_size": block_size}
    y = run_matmul_nbits(tensors, attributes, torch.eye(k))
    torch.testing.assert_close(y.T, dequantize_packed(weight), rtol=1e-5, atol=1e-6)
    back = from_matmul_nbits(tensors, attributes)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(dequantize_packed(back), dequantize_packed(weight))
    assert back.group_size == (k if group_size == k else block_size)


def test_padding_of_onnx_runtime_may_hold_anything():
    tensors = {"B": torch.full((1, 1, 8), 0xFF, dtype=torch.uint8), "scales": torch.ones(1)}
    weight = from_matmul_nbits(tensors, {"K": 3, "N": 1, "bits": 4, "block_size": 16})
    assert weight.codes.tolist() == [[0xFF, 0x0F]] and tensors["B"].min() == 0xFF


# what is refused


def ct(**change):
    tensors, _ = to_compressed_tensors(weight_of(zero=3))
    return {key: t for key, t in (tensors | change).items() if t is not None}


def gptq(**change):
    return {key: t for key, t in (to_gptq(weight_of(zero=3)) | change).items() if t is not None}


def awq(**change):
    return {key: t for key, t in (to_awq(weight_of(zero=3)) | change).items() if t is not None}


def nbits(**change):
    tensors, _ = to_matmul_nbits(weight_of(zero=3))
    return {key: t for key, t in (tensors | change).items() if t is not None}


def from_nbits(tensors, **change):
    return from_matmul_nbits(tensors, {"K": 64, "N": 32, "bits": 4, "block_size": 32} | change)


INT = torch.int32


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: from_compressed_tensors(ct(), bits=3), "bits must be one of 1, 2, 4, 8, got 3"),
        (lambda: from_compressed_tensors(ct(weight_g_idx=torch.zeros(64)), bits=4), "got weight_g_idx too; .* lost"),
        (lambda: from_compressed_tensors(ct(weight_scale=None), bits=4), "weight must have .*, got no weight_scale"),
        (lambda: from_compressed_tensors(ct(), bits=8), r"weight_packed must have shape \[32, 16\] for 8 bits"),
        (lambda: from_compressed_tensors(ct(weight_packed=torch.zeros(32, 8)), bits=4), "weight_packed must be int32"),
        (lambda: from_compressed_tensors(ct(weight_shape=torch.ones(3)), bits=4), "weight_shape must hold N and K"),
        (lambda: from_compressed_tensors(ct(weight_scale=torch.ones(32, 3)), bits=4), "3 groups: K must be a multiple"),
        (lambda: from_compressed_tensors(ct(weight_scale=torch.ones(31, 2)), bits=4), r"scale must have shape \[32, 2"),
        (
            lambda: from_compressed_tensors(ct(weight_zero_point=torch.ones(2, 4).int()), bits=4),
            r"weight_zero_point must have shape \[4, 2\], got \[2, 4\]",
        ),
        (lambda: from_gptq(gptq(), bits=1, group_size=32), "got 1; GPTQ has no 1-bit weights"),
        (lambda: from_gptq(gptq(), bits=3, group_size=32), "bits must be one of 1, 2, 4, 8, got 3"),
        (lambda: from_gptq(gptq(), bits=4, group_size=32, version=3), r"version must be 1 \('gptq'\) or 2"),
        (lambda: from_gptq(gptq(), bits=4, group_size=64), r"weight.scales must have shape \[1, 32\]"),
        (lambda: from_gptq(gptq(), bits=4, group_size=0), r"weight.scales must have shape \[0, 32\]"),
        (lambda: from_gptq(gptq(qzeros=torch.ones(2, 5).int()), bits=4, group_size=32), r"qzeros must have shape \[2"),
        (lambda: from_gptq(gptq(bias=torch.ones(32)), bits=4, group_size=32), "got bias too"),
        (lambda: from_gptq(gptq(g_idx=torch.ones(64).int()), bits=4, group_size=32), "every group 32 times"),
        (lambda: from_gptq(gptq(g_idx=torch.ones(192).int()), bits=4, group_size=32), r"g_idx must be int32 of shape"),
        (
            lambda: from_gptq(
                gptq(scales=torch.ones(6, 32), qzeros=torch.ones(6, 4).int(), g_idx=None), bits=4, group_size=12
            ),
            "share a divisor >= 16 with it, got K=64, group_size=12; pad K",
        ),
        (lambda: to_gptq(weight_of(n=33)), r"N and K of weight must be multiples of 32, got \[33, 64\]; pad"),
        (lambda: to_gptq(weight_of(bits=1, zero=1)), "GPTQ has no 1-bit weights"),
        (lambda: to_gptq(weight_of(zero=7.5)), r"zero points of weight must be integers in 0\.\.15, got 7\.5;"),
        (lambda: to_gptq(weight_of(zero=16)), r"integers in 0\.\.15, got 16;"),
        (lambda: from_awq(awq(qzeros=torch.ones(2, 8, dtype=INT))), r"qzeros must have shape \[2, 4\].*gemm version"),
        (lambda: from_awq(awq(scales=torch.ones(3, 32), qzeros=torch.ones(3, 4).int())), "3 groups: K must be a mul"),
        (lambda: from_awq(awq(qweight=torch.ones(64, 4))), "weight.qweight must be int32, got float32"),
        (lambda: from_awq(awq(qweight=torch.ones(64, dtype=INT))), r"qweight must have two axes .*got \[64\]"),
        (lambda: to_awq(weight_of(n=30)), "N of weight must be a multiple of 8, got N=30; pad"),
        (lambda: to_awq(weight_of(bits=8)), "weight must have 4 bits, got 8"),
        (lambda: from_nbits(nbits(), bits=1), "MatMulNBits has no 1-bit weights"),
        (lambda: from_nbits(nbits(), block_size=24), "block_size of weight must be a power of two >= 16, got 24"),
        (lambda: from_nbits(nbits(), K=63), "share a divisor >= 16 with it, got K=63, group_size=32"),
        (lambda: from_nbits(nbits(), N=31), r"weight.B must have shape \[31, 2, 16\], got \[32, 2, 16\]"),
        (lambda: from_nbits(nbits(scales=torch.ones(5))), r"weight.scales must have shape \[32, 2\], got \[5\]"),
        (lambda: from_nbits(nbits(zero_points=torch.ones(5).byte())), r"zero_points must have shape \[32, 1\]"),
        (lambda: from_nbits(nbits(g_idx=torch.ones(64))), "got g_idx too"),
        (lambda: from_matmul_nbits(nbits(), {"K": 64}), "must have K, N, block_size, got no N, block_size"),
        (lambda: to_matmul_nbits(weight_of(bits=1)), "MatMulNBits has no 1-bit weights"),
        (lambda: to_matmul_nbits(weight_of(k=72, group_size=24)), "group_size of weight must be a multiple of 16"),
        (lambda: to_matmul_nbits(weight_of(bits=8, zero=1.5)), r"must be integers in 0\.\.255, got 1\.5"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("export", [to_compressed_tensors, to_gptq, to_awq, to_matmul_nbits])
def test_uneven_levels_are_refused_by_every_format(export):
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    weight = pack_weight(codes, torch.ones(32), bits=4, levels=torch.linspace(-1, 1, 16))
    with pytest.raises(ValueError, match="fc must have evenly spaced levels, got a table of 16 levels"):
        export(weight, name="fc")


def test_zero_points_that_the_dtype_of_the_scales_cannot_hold_are_refused():
    weight = weight_of(zero=7.1)
    half = PackedWeight(weight.codes, weight.scale.half(), 7.1, None, 4, weight.shape, 32)
    with pytest.raises(ValueError, match=r"zero points of weight must be exact in float16, .*, got 7\.1; use"):
        to_matmul_nbits(half)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_no_computation_survives_are_refused_on_the_way_in(bad):
    scales = torch.ones(2, 32)
    scales[1, 4] = bad
    module = types.SimpleNamespace(gptq=gptq(scales=scales), awq=awq(scales=scales))
    for load in (lambda: from_gptq(module.gptq, bits=4, group_size=32), lambda: from_awq(module.awq)):
        with pytest.raises(ValueError, match=rf"weight.scale must be finite, got {bad} at \[4, 1\]"):
            load()
