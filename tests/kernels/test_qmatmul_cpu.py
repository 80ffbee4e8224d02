"""The CPU's ways to multiply: each compiled loop against the reference, at sizes that meet its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gs_kernels import PackedWeight, pack_weight, qmatmul, qmatmul_int8, row_sums
from gs_kernels.dispatch import INTERPRET
from gs_kernels.qmatmul import cpu
from gs_kernels.qmatmul.ref import qmatmul_int8_ref, qmatmul_ref
from tests.helpers import relative_rms

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiled for the CPU")

# bits, N, K, group, zero points that are no integers: rows and groups that fill no block, and one group
WEIGHTS = {"4 bit": (4, 70, 192, 48, True), "8 bit": (8, 33, 80, 80, False), "1 bit": (1, 40, 264, 88, True)}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "COMPILE_FROM", 0)
    monkeypatch.setattr(cpu, "BLOCK", 1 << 12)


def weight(bits: int, n: int, k: int, group: int, fractions: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=generator) / 50 + 0.01
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator).float()
    return pack_weight(codes, scale, zero + 0.25 if fractions else zero, bits=bits, group_size=group)


def rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in WEIGHTS), ("4 bit", torch.bfloat16)])
def test_float_rows(name: str, dtype: torch.dtype):
    w = weight(*WEIGHTS[name])
    for m in (1, 3, 4, 9, 1 + cpu.FEW_ROWS[dtype]):
        x = rows(m, w.shape[1]).to(dtype)
        got, want = qmatmul(x, w), qmatmul_ref(x.float(), w)
        assert got.shape == want.shape and relative_rms(got.float(), want) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("name", ["4 bit", "8 bit"])
def test_integer_rows(name: str):
    w = weight(*WEIGHTS[name])
    x_scale, x_zero, sums = torch.full((1,), 0.03), torch.full((1,), 5.0), row_sums(w)
    for m in (1, 5, 33):
        x = (rows(m, w.shape[1]) * 50).round().clamp(-128, 127).to(torch.int8)
        got = qmatmul_int8(x, x_scale, w, x_zero=x_zero, weight_sums=sums)
        want = qmatmul_int8_ref(x, x_scale, w, x_zero=x_zero)
        assert relative_rms(got, want) < 1e-6


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
