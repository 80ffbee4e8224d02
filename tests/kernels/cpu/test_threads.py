"""The number of threads changes no bit of what C++ multiplies, at sizes from which threads share a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gs_kernels import PackedWeight, code_sums, pack_weight, qconv2d_int8, qmatmul, qmatmul_int8
from gs_kernels.qconv2d.cpu import int8_kernel
from gs_kernels.qmatmul.cpu.interleaved_product import PARALLEL_FROM
from gs_kernels.runtime.dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="threads are those of the CPU's own kernels")
COUNTS = (1, 2, 3, 7)
DRAW = torch.Generator().manual_seed(0)


def threads_change_no_bit(call: Callable[..., Tensor], *args: Any, **options: Any) -> bool:
    before, results = torch.get_num_threads(), set()
    try:
        for threads in COUNTS:
            torch.set_num_threads(threads)
            results.add(call(*args, **options).contiguous().view(torch.uint8).numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    return len(results) == 1


def weight(bits: int, n: int, k: int, group: int) -> PackedWeight:
    codes = torch.randint(0, 2**bits, (n, k), generator=DRAW, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=DRAW) / 50 + 0.01
    return pack_weight(codes, scale, torch.full_like(scale, 0.5), bits=bits, group_size=group)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_rows_of_floats(bits: int, dtype: torch.dtype):
    w = weight(bits, 200, 192, 48)  # 13 blocks of rows: no count has equal shares
    for m in (1, 3, 6, 14, 65):
        assert m * 200 * 192 >= PARALLEL_FROM
        x = torch.randn(m, 192, generator=DRAW).to(dtype)
        assert threads_change_no_bit(qmatmul, x, w)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [48, 192])
def test_of_rows_of_codes(bits: int, group: int):
    w = weight(bits, 200, 192, group)
    sums, x_scale = code_sums(w), torch.full((1,), 0.03)
    for m in (1, 5, 33):
        x = torch.randint(-128, 128, (m, 192), generator=DRAW, dtype=torch.int8)
        assert threads_change_no_bit(qmatmul_int8, x, x_scale, w, code_sums=sums)


@pytest.mark.parametrize("grid", [{}, {"out_scale": torch.tensor([0.1]), "out_zero": torch.tensor([3.0])}])
@pytest.mark.parametrize(
    "channels, o, options",
    [
        (24, 100, {"kernel_size": 3, "padding": 1}),
        (64, 70, {"kernel_size": 1}),
        (48, 96, {"kernel_size": 3, "stride": 2, "groups": 4}),
        (160, 160, {"kernel_size": 3, "padding": 1, "groups": 160}),
    ],
    ids=["3 x 3", "points", "groups", "depthwise"],
)
def test_of_images(channels: int, o: int, options: dict[str, Any], grid: dict[str, Tensor]):
    k = options["kernel_size"] ** 2 * channels // options.get("groups", 1)
    x = torch.randint(-128, 128, (3, channels, 14, 10), generator=DRAW, dtype=torch.int8)
    w, x_scale = weight(4, o, k, k), torch.tensor([0.05])
    y = qconv2d_int8(x, x_scale, w, **options, **grid)
    assert y.numel() * k >= max(int8_kernel.PARALLEL_FROM, int8_kernel.PARALLEL_DEPTHWISE)
    assert threads_change_no_bit(qconv2d_int8, x, x_scale, w, **options, **grid)
