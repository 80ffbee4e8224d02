"""Perplexity against a sum by hand: windows, strides, and the token that begins a text."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from gs_algos.llm.perplexity import perplexity
from tests.nets.language_models import tiny_llama

BOS = 1  # of the tiny Llama's config
TEXT = torch.randint(3, 32, (41,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(model: torch.nn.Module, windows: list[tuple[torch.Tensor, int]]) -> tuple[float, int]:
    """Windows of tokens, and how many of the last are predicted."""
    losses = [
        cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[-scored:] for ids, scored in windows
    ]
    loss = torch.cat(losses)
    return math.exp(loss.mean()), len(loss)


@pytest.mark.parametrize("stride", [None, 8, 3])
def test_windows_of_a_text_without_a_beginning(stride):
    model, step = tiny_llama(), stride or 8
    windows = [(TEXT[i : i + 8], 7 if i == 0 else min(step, 7)) for i in range(0, len(TEXT) - 7, step)]
    result = perplexity(model, TEXT, 8, stride, progress=False)
    value, tokens = by_hand(model, windows)
    assert (result.value, result.tokens) == (pytest.approx(value, rel=1e-5), tokens)


@pytest.mark.parametrize("stride", [None, 8, 3])
def test_the_beginning_of_a_text_is_before_every_window(stride):
    model, first, step = tiny_llama(), torch.tensor([BOS]), min(stride or 7, 7)
    windows = [
        (torch.cat((first, TEXT[i : i + 7])), 7 if i == 0 else step) for i in range(0, len(TEXT) - 6, step)
    ]  # fmt: skip
    result = perplexity(model, torch.cat((first, TEXT)), 8, stride, progress=False)
    value, tokens = by_hand(model, windows)
    assert (result.value, result.tokens) == (pytest.approx(value, rel=1e-5), tokens)
    if stride is None:
        assert tokens == 5 * 7  # every token of the text that fills a window, its first too
