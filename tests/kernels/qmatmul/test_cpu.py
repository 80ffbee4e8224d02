"""The CPU's ways to multiply: each compiled loop against the reference, at sizes that meet its edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gs_kernels import PackedWeight, code_sums, pack_weight, qmatmul, qmatmul_int8
from gs_kernels.cpu import library
from gs_kernels.cpu.compile import instruction_sets
from gs_kernels.qmatmul.cpu import avx512_bf16, float, int8, interleaved_product, quantize_rows
from gs_kernels.qmatmul.cpu.interleaved import interleaved
from gs_kernels.qmatmul.ref import exact_weight, qmatmul_int8_ref, qmatmul_ref, quantize_rows_ref
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.instructions import REQUIRED, has
from tests.helpers import relative_rms

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiled for the CPU")

# bits, N, K, group, zero points that are no integers: rows and groups that fill no block, and one group
WEIGHTS = {"4 bit": (4, 70, 192, 48, True), "8 bit": (8, 33, 80, 80, False), "1 bit": (1, 40, 264, 88, True)}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float, "BLOCK", 1 << 12)


def weight(bits: int, n: int, k: int, group: int, fractions: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=generator) / 50 + 0.01
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator).float()
    return pack_weight(codes, scale, zero + 0.25 if fractions else zero, bits=bits, group_size=group)


def rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in WEIGHTS), ("4 bit", torch.bfloat16)])
def test_float_rows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(avx512_bf16, "supports", lambda m: False)
    check_float_rows(weight(*WEIGHTS[name]), dtype, (1, 2, 3, 4, 5, 9, 12, 13, 65, 530))


def check_float_rows(w: PackedWeight, dtype: torch.dtype, ms: tuple[int, ...]) -> None:
    for m in ms:
        x = rows(m, w.shape[1]).to(dtype)
        got, want = qmatmul(x, w), qmatmul_ref(x.float(), w)
        assert got.shape == want.shape and relative_rms(got.float(), want) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("name", instruction_sets())
def test_float_rows_with_each_set_of_instructions(name: str):
    for of in WEIGHTS.values():
        w, bias = weight(*of), rows(1, of[1])[0]
        for m in (1, 2, 3, 6, 14, 29):
            x = rows(m, w.shape[1])
            for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
                want = qmatmul_ref(x.to(dtype).float(), w, bias)
                assert relative_rms(multiplied(name, x.to(dtype), w, dtype, bias).float(), want) < limit


def multiplied(
    name: str, x: Tensor, w: PackedWeight, y_dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor:
    """Multiplies by the C++ of a set of instructions."""
    if interleaved_product.kernels() is None or not all(map(has, REQUIRED[name])):
        pytest.skip(f"no C++ for {name} runs here")
    functions = library.open_library(library.path_of(name))
    for function, argtypes in interleaved_product.FUNCTIONS.items():
        getattr(functions, function).argtypes, getattr(functions, function).restype = argtypes, None
    form, bias_dtype = interleaved(w), None if bias is None else bias.dtype
    product = interleaved_product.fixed_product(form, x.dtype, y_dtype, bias_dtype)
    return interleaved_product.bind(functions.interleaved_product, product, x.shape, y_dtype, form, bias)(x)


# of x: size, and a number every 136 elements. Rows are written in whole numbers of two pieces, but for the last four
ROWS = {
    "as drawn": (1.0, None),
    "one large element of each group": (1e-4, 3e3),
    "whole numbers": (0.0, 7.0),
    "zeros": (0.0, None),
    "tiny": (1e-33, None),
    "huge": (1e32, None),
    "infinite": (1.0, torch.inf),
    "not a number": (1.0, torch.nan),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", instruction_sets())
def test_few_rows_of_any_size_with_each_set_of_instructions(name: str, kind: str):
    size, other = ROWS[kind]
    x = rows(3, 408) * size
    if other is not None:
        x[0, 5::136] = other
    for bits in (1, 2, 4, 8):
        w = weight(bits, 70, 408, 136, True)
        y, want = multiplied(name, x, w), x.double() @ exact_weight(w).T
        finite = x.isfinite().all(1)
        assert not y[~finite].isfinite().any() and y[finite].isfinite().all()
        # of what is summed before zero points are taken off
        limit = x.abs().sum(1, keepdim=True) * w.scale.max() * 2**bits
        assert ((y - want).abs() <= 2e-7 * limit)[finite].all()


@pytest.mark.parametrize("large", [1.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("name", instruction_sets())
def test_bf16_rows_lose_little_of_the_elements_beside_large_ones(name: str, large: float):
    """Large elements meet weights of 0: the result is that of the others, which a bf16 result rounds by up to 2**-9."""
    x, bits, group = rows(5, 384), 4, 128
    x[:, 7::64] = large
    x = x.to(torch.bfloat16)
    codes = torch.randint(16, (40, 384), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, 7::64] = 8
    w = pack_weight(codes, torch.full((40, 3), 0.01), 8.0, bits=bits, group_size=group)
    y, dense = multiplied(name, x, w), exact_weight(w)
    others = x.double()
    others[:, 7::64] = 0
    limit = 2**-12 * others.abs().sum(1, keepdim=True) * dense.abs().max() + 2**-22 * large
    assert ((y - others @ dense.T).abs() <= limit).all()
    assert relative_rms(y.float(), others @ dense.T) < 2**-11


@pytest.mark.parametrize("name", instruction_sets())
def test_bits_of_a_row_are_those_that_it_has_alone(name: str):
    w = weight(*WEIGHTS["4 bit"])
    x = rows(9, w.shape[1])
    x[1, 3], x[4] = 1e4, 0  # more digits than its neighbours, fewer
    x[6, 0], x[7] = torch.nan, 1e-38
    x = x.to(torch.bfloat16)
    together = multiplied(name, x, w)
    for i, alone in enumerate(x):
        assert torch.equal(together[i].nan_to_num(3.0), multiplied(name, alone.view(1, -1), w)[0].nan_to_num(3.0))


needs_bf16 = pytest.mark.skipif(
    not avx512_bf16.supports(8), reason="needs AVX-512 dot products of bf16, and no matrix unit"
)


@needs_bf16
@pytest.mark.parametrize("of", [*WEIGHTS.values(), (2, 100, 1320, 264, True)], ids=lambda of: f"{of[0]} bit")
def test_bf16_rows_in_cpp(of: tuple[int, int, int, int, bool], monkeypatch: pytest.MonkeyPatch):
    """Tiles of all sizes: each against products in fp32 with weights that are not rounded."""
    monkeypatch.setattr(interleaved_product.kernels(), "interleaved_product", None)
    w, run = weight(*of), avx512_bf16.kernels().bf16_product
    check_float_rows(w, torch.bfloat16, (5, 12, 13, 1030))
    for m in (*range(1, 14), 1030):
        x = rows(m, w.shape[1]).to(torch.bfloat16)
        product = interleaved_product.fixed_product(interleaved(w), torch.bfloat16, torch.float32)
        multiply = interleaved_product.bind(run, product, x.shape, torch.float32, interleaved(w))
        assert relative_rms(multiply(x), qmatmul_ref(x.float(), w)) < 1e-6


@needs_bf16
def test_no_cpp_no_harm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Without the library, and where the compiled code is wrong: said once, and computed another way."""
    w = weight(*WEIGHTS["4 bit"])
    for target, name, broken, said in (
        (library, "path_of", lambda name: Path("/no/such/file"), "was not built"),
        (avx512_bf16, "bind", lambda *_: lambda x: torch.zeros(()), "wrong results"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(library, "_problems", {})
            library.library.cache_clear()
            patch.setattr(target, name, broken)
            avx512_bf16.kernels.cache_clear()
            caplog.clear()
            check_float_rows(w, torch.bfloat16, (9, 20))
        assert [said in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]
        library.library.cache_clear()
    avx512_bf16.kernels.cache_clear()


@pytest.mark.parametrize("large", [0, int8.LARGE], ids=["packed codes", "panels"])
@pytest.mark.parametrize("name", ["4 bit", "8 bit"])
def test_integer_rows(name: str, large: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8, "LARGE", large)
    w = weight(*WEIGHTS[name])
    x_scale, x_zero, sums = torch.full((1,), 0.03), torch.full((1,), 5.0), code_sums(w)
    for m in (1, 5, 33):
        x = (rows(m, w.shape[1]) * 50).round().clamp(-128, 127).to(torch.int8)
        got = qmatmul_int8(x, x_scale, w, x_zero=x_zero, code_sums=sums)
        want = qmatmul_int8_ref(x, x_scale, w, x_zero=x_zero)
        assert relative_rms(got, want) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x_zero", [None, -3.0])
def test_sums_of_rows_with_one_scale_are_exact(bits: int, x_zero: float | None):
    n, k = 520, 512
    codes = torch.randint(2**bits, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    zero = torch.arange(n).remainder(5).view(-1, 1) + 2 ** (bits - 1) - 2.0
    w = pack_weight(codes, torch.linspace(-0.1, 0.2, n).view(-1, 1), zero, bits=bits, group_size=k)
    about = {} if x_zero is None else {"x_zero": torch.tensor([x_zero]), "code_sums": code_sums(w)}
    for m in (1, 5, 33):
        x = (rows(m, k) * 50).round().clamp(-128, 127).to(torch.int8)
        sums = (x.long() - int(x_zero or 0)) @ (codes.long() - zero.long()).T
        want = sums.float() * w.scale.view(-1) * 0.03 + 0.5
        bias, x_scale = torch.full((n,), 0.5), torch.full((1,), 0.03)
        assert torch.equal(qmatmul_int8(x, x_scale, w, bias, **about), want)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_weights_are_multiplied_by_the_compiled_loops(bits: int, monkeypatch: pytest.MonkeyPatch):
    """The last layer of a small network, whatever the number of rows: no reference, nothing dequantized beforehand."""
    if interleaved_product.kernels() is None:
        pytest.skip("no C++ compiler")
    for module, name in ((int8, "qmatmul_int8_ref"), (float, "_plain")):
        monkeypatch.setattr(module, name, None)
    n, k = 10, 64
    codes = torch.randint(2**bits, (n, k), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    w = pack_weight(codes, torch.linspace(0.1, 0.2, n).view(-1, 1), torch.ones(n, 1), bits=bits, group_size=k)
    about = {"x_zero": torch.tensor([7.0]), "code_sums": code_sums(w)}
    for m in (1, 64, 1030):
        x = (rows(m, k) * 50).round().clamp(-128, 127).to(torch.int8)
        want = ((x.long() - 7) @ (codes.long() - 1).T).float() * w.scale.view(-1) * 0.03
        assert torch.equal(qmatmul_int8(x, torch.full((1,), 0.03), w, **about), want)
    check_float_rows(w, torch.float32, (1, 64, 1030))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_whole_numbers_in_fp32_give_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch):
    """Without the library, and by each of its loops: all codes at their ends."""
    n, k = 33, 2304
    codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8)
    codes[1] = 0
    w = pack_weight(codes, torch.full((n, 1), 0.01), torch.full((n, 1), 1.0), bits=bits, group_size=k)
    x = torch.full((6, k), -128, dtype=torch.int8)
    x[1] = 127
    about = {"x_zero": torch.tensor([100.0]), "code_sums": code_sums(w)}
    want = ((x.long() - 100) @ (codes.long() - 1).T).float() * 0.01
    for large in (int8.LARGE, 0):
        monkeypatch.setattr(int8, "LARGE", large)
        assert torch.equal(qmatmul_int8(x[:4], torch.ones(1), w, **about), want[:4])
    assert torch.equal(qmatmul_int8(x, torch.ones(1), w, **about), want)
    monkeypatch.setattr(int8, "kernels", lambda: None)
    assert torch.equal(qmatmul_int8(x, torch.ones(1), w, **about), want)


@pytest.mark.parametrize("n", [4, 520])
def test_a_zero_point_of_rows_is_whole(n: int):
    w = pack_weight(torch.ones(n, 512, dtype=torch.uint8), torch.ones(n, 1), bits=4, group_size=512)
    x, one, sums = torch.ones(1, 512, dtype=torch.int8), torch.ones(1), code_sums(w)
    with pytest.raises(ValueError, match=r"qmatmul_int8: x_zero must be a whole number, got 0\.5"):
        qmatmul_int8(x, one, w, x_zero=torch.tensor([0.5]), code_sums=sums)
    far = qmatmul_int8(x, one, w, x_zero=torch.tensor([300.0]), code_sums=sums)  # of a grid that was learnt
    assert torch.equal(far, torch.full((1, n), -299.0 * 512 * (1 - 8)))


def test_a_row_does_not_depend_on_its_neighbours():
    w = weight(*WEIGHTS["4 bit"])
    x = rows(6, w.shape[1])
    torch.testing.assert_close(qmatmul(x, w)[4:5], qmatmul(x[4:5], w), rtol=1e-5, atol=1e-5)


def test_a_changed_scale_is_seen():
    w = weight(*WEIGHTS["4 bit"])
    x = rows(2, w.shape[1])
    before = qmatmul(x, w)
    w.scale.mul_(2)
    torch.testing.assert_close(qmatmul(x, w), 2 * before)


def test_gradients_and_transforms_still_go_through_the_op():
    w = weight(*WEIGHTS["4 bit"])
    x = rows(2, w.shape[1]).requires_grad_()
    qmatmul(x, w).sum().backward()
    torch.testing.assert_close(x.grad, qmatmul_ref(torch.eye(w.shape[1]), w).sum(1).expand(2, -1), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(qmatmul(x.detach(), w), qmatmul(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert qmatmul(rows(1, w.shape[1]), w).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", instruction_sets())
def test_rows_are_quantized_to_the_bits_of_the_reference(name: str, dtype: torch.dtype, monkeypatch):
    if not all(map(has, REQUIRED[name])):
        pytest.skip(f"this CPU has no {name}")
    declared, found = quantize_rows.kernels(), library.open_library(library.path_of(name))
    found.quantize_rows.argtypes, found.quantize_rows.restype = declared.quantize_rows.argtypes, None
    monkeypatch.setattr(quantize_rows, "kernels", lambda: found)
    x = rows(9, 523) * torch.tensor([1, 1e-3, 0, 3e4, 1e-40, 1, 1, 1, -0.0]).unsqueeze(1)
    for row, value in ((5, torch.nan), (6, torch.inf), (7, -900.0)):
        x[row, 522] = value
    x = x.to(dtype)
    for part in (x, x[3], x[:, :16], x[:, 5:20], x[::2, :1], x[:, ::2], x.view(3, 3, 523).transpose(0, 1), x[:0]):
        (codes, scale), want = quantize_rows.quantize_rows_cpu(part, torch.int8), quantize_rows_ref(part)
        assert torch.equal(codes, want[0]) and codes.is_contiguous() and codes.dtype == torch.int8
        assert torch.equal(scale.nan_to_num(7.0), want[1].nan_to_num(7.0)) and scale.shape == part.shape[:-1]
