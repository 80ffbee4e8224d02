"""A weight that is dequantized first takes a buffer of bounded size, and its slabs give what the whole of it gives."""

import pytest
import torch

from gs_kernels import dequantize_packed, qmatmul
from gs_kernels.formats import E2M1
from gs_kernels.pack.layouts import PLANAR
from gs_kernels.pack.pack import pack_weight
from gs_kernels.qmatmul.ref import qmatmul_ref
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms

dense = pytest.importorskip("gs_kernels.qmatmul.kernel.dense", reason="Triton is not installed: there are no kernels")
in_kernels = pytest.mark.skipif(
    not INTERPRET and DEVICE.type != "cuda", reason="kernels run in the interpreter or on a GPU"
)


def weight(n, k, group, zero="points", divisors=0):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=draw)
    scale = torch.rand(n, k // group, generator=draw).add_(0.5)
    if divisors:
        divisor = torch.linspace(0.5, 2.0, divisors)
        args = {"levels": torch.tensor(E2M1), "divisor": divisor}
        return pack_weight(codes, scale.to(torch.float8_e4m3fn), bits=4, group_size=group, layout=PLANAR, **args).to(
            DEVICE
        )
    points = torch.rand(n, k // group, generator=draw).mul_(15) if zero == "points" else zero
    return pack_weight(codes, scale, points, bits=4, group_size=group, layout=PLANAR).to(DEVICE)


WEIGHTS = {
    "points of groups over a block": weight(70, 512, 256),
    "a K that ends in a block": weight(33, 320, 64),
    "one group a row": weight(40, 300, 300, 7.5),
    "divisors of halves": weight(66, 256, 16, divisors=2),
}


@pytest.mark.parametrize("nbytes", [1, 1000, 1 << 40])
@pytest.mark.parametrize("size, unit", [(1, 256), (256, 256), (700, 256), (1025, 128), (28672, 256)])
def test_slabs_are_whole_units_one_after_the_other_and_about_equal(monkeypatch, size, unit, nbytes):
    monkeypatch.setattr(dense, "DENSE_BYTES", max(1, nbytes // 3))
    parts = dense.slabs(size, unit, nbytes)
    firsts, ends = zip(*parts, strict=True)
    assert firsts == (0, *ends[:-1]) and ends[-1] == size and all(first % unit == 0 for first in firsts)
    units = [-(-(end - first) // unit) for first, end in parts]
    assert max(units) - min(units) <= 1
    assert len(parts) == min(-(-size // unit), 1 if nbytes == 1 else 4 if nbytes % 3 else 3)


@in_kernels
@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
def test_slabs_of_rows_and_of_columns_are_those_of_the_reference(w):
    from gs_kernels.qmatmul.kernel.dequantize import dequantize_slab

    whole, (n, k) = dequantize_packed(w), w.shape
    for first_n, end_n, first_k, end_k in ((0, 32, 0, k), (32, n, 0, k), (0, n, 0, 128), (0, n, 128, k)):
        slab = torch.full((end_n - first_n, end_k - first_k), float("nan"), device=DEVICE)
        wanted = whole[first_n:end_n, first_k:end_k]
        torch.testing.assert_close(dequantize_slab(slab, w, first_n, first_k), wanted, rtol=1e-5, atol=1e-5)


@in_kernels
def test_products_and_gradients_of_slabs_are_those_of_the_whole(monkeypatch):
    w, draw, sizes = weight(260, 160, 32), torch.Generator().manual_seed(1), []
    x, dy = torch.randn(1, 17, 160, generator=draw).to(DEVICE), torch.randn(1, 17, 260, generator=draw).to(DEVICE)
    bias = torch.randn(260, generator=draw).to(DEVICE)
    monkeypatch.setattr(dense, "DENSE_BYTES", 4 * 256 * 160)  # of fp32: two slabs of rows, and of columns
    monkeypatch.setattr(dense, "_buffer", lambda *args, make=dense._buffer: sizes.append(made := make(*args)) or made)
    found, wanted = [], []
    for run, results in ((qmatmul, found), (qmatmul_ref, wanted)):
        leaf = x.clone().requires_grad_()
        y = run(leaf, w, bias)
        results += [y, *torch.autograd.grad(y, leaf, dy), run(x, w, activation="silu")]
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))
    assert [made.numel() for made in sizes] == [256 * 160, 260 * 128, 256 * 160]
