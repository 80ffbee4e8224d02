"""A layer's inputs as rows: multiplied with its weight they give its output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gs_algos.core.input_rows import input_rows, token_mask

CONVS = [
    (nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2), (2, 6, 9, 7)),
    (nn.Conv2d(6, 8, (3, 1), padding="same", dilation=(2, 1)), (2, 6, 9, 7)),
    (nn.Conv2d(8, 8, 3, groups=8), (8, 6, 6)),
    (nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (3, 4, 11)),
    (nn.Conv1d(4, 6, 1), (3, 4, 11)),
    (nn.Conv3d(2, 4, 2, groups=2), (2, 2, 5, 4, 3)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVS, ids=str)
def test_patches_times_the_weight_are_the_convolution(conv, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = input_rows(conv, x)
    rows = rows if rows.dim() == 3 else rows.unsqueeze(0)
    weight = conv.weight.flatten(1).view(conv.groups, -1, rows.shape[-1])
    got = torch.bmm(rows, weight.transpose(1, 2)).movedim(0, 1).flatten(1)  # [B * L, O]
    want = conv(x if x.dim() == len(conv.kernel_size) + 2 else x.unsqueeze(0)).flatten(2).movedim(1, 2).flatten(0, 1)
    torch.testing.assert_close(got + conv.bias, want, rtol=1e-5, atol=1e-6)


def test_padding_tokens_give_no_row():
    x = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = input_rows(nn.Linear(4, 2), x, token_mask({"attention_mask": mask}))
    assert rows.tolist() == [x[0, 0].tolist(), x[0, 1].tolist(), x[1, 0].tolist()]


def test_a_mask_of_another_shape_counts_for_nothing():
    assert input_rows(nn.Linear(4, 2), torch.ones(5, 4), torch.ones(2, 3, dtype=torch.bool)).shape == (5, 4)
    assert token_mask({"attention_mask": torch.ones(2, 1, 3, 3)}) is None and token_mask(torch.ones(2)) is None
