"""Products of fp32 by oneDNN are those of BLAS, whatever the strides, and gradients are left to PyTorch."""

import pytest
import torch

from gs_kernels.cpu import matmul as module
from gs_kernels.cpu.matmul import add_matmul_, linear, matmul, onednn_takes
from gs_kernels.runtime.instructions import has


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(got, left, right, total=0.0):
    want = total + left.double() @ right.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m, k, n", [(1, 7, 3), (129, 131, 257), (5, 1024, 600)])
def test_every_layout_gives_the_product(m, k, n):
    padded = draw(k, n + 9)[:, 4 : 4 + n]
    for left in (draw(m, k), draw(k, m).t(), draw(m, k + 3)[:, 1:-2]):
        for right in (draw(k, n), draw(n, k).t(), padded, draw(n, k + 5)[:, 3:-2].t()):
            close(matmul(left, right), left, right)
            close(linear(left, right.t(), draw(n)), left, right, draw(n).double())
            close(matmul(left[None], right[None])[0], left, right)
            total = draw(m, n + 2)[:, 1:-1]
            before = total.double()
            add_matmul_(total, left, right)
            close(total, left, right, before)


def test_several_matrices_are_multiplied_one_by_one():
    left, right = draw(3, 200, 150), draw(3, 150, 300)
    close(matmul(left, right), left, right)


def test_leading_axes_stay():
    x, weight = draw(2, 128, 96), draw(192, 96)
    close(linear(x, weight), x, weight.t())


def test_onednn_takes_large_fp32_without_gradients():
    x, weight = draw(256, 256), draw(256, 256)
    there = module.linear_of_onednn is not None and has("avx512_f") and torch.backends.mkldnn.is_available()
    assert onednn_takes(x, weight) == there
    assert not onednn_takes(x[:1], weight)
    assert not onednn_takes(x.double(), weight.double()) and not onednn_takes(x, weight, draw(256).bfloat16())
    weight.requires_grad_()
    assert not onednn_takes(x, weight)
    with torch.no_grad():
        assert onednn_takes(x, weight) == there
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(256, -1), rtol=1e-5, atol=1e-4)
