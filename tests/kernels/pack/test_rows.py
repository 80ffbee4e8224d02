"""Chosen rows of a packed weight, as an embedding reads them."""

import pytest
import torch

from gs_kernels import dequantize_packed, pack_weight
from gs_kernels.pack import rows
from gs_kernels.runtime.dispatch import INTERPRET


def weight(bits, k=15, group=5):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (7, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(7, k // group, generator=generator).to(torch.float16)
    zero = torch.full_like(scale, 2.0 ** (bits - 1) - 0.5)
    return pack_weight(codes, scale, zero, bits=bits, group_size=group)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_the_bits_of_the_whole_weight(bits, dtype):
    w, ids = weight(bits), torch.tensor([6, 0, 0, 3], dtype=torch.int32)
    assert torch.equal(rows.dequantize_rows(w, ids, dtype), dequantize_packed(w, dtype)[ids])


def test_a_row_that_is_not_there_is_refused():
    for row in (7, -1):
        with pytest.raises((IndexError, RuntimeError)):
            rows.dequantize_rows(weight(4), torch.tensor([row]), torch.float32)


@pytest.mark.skipif(INTERPRET or rows.kernels() is None, reason="the C++ kernels were not built")
def test_nothing_is_compiled_by_a_call(monkeypatch):
    monkeypatch.setattr(rows, "dequantize_packed", None)
    assert rows.dequantize_rows(weight(4), torch.tensor([1]), torch.float32).shape == (1, 15)
