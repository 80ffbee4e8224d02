"""Measures the perplexity of a causal language model on a text, `exp(mean of -log p(token | tokens before))`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import evaluating
from gs_algos.core.progress import progress as progress_bar
from gs_algos.llm.libraries import library
from gs_algos.llm.static_cache import cache_argument
from gs_algos.ptq.kv import KVScheme, chosen_kv

CONTEXT = 1024  # tokens of a window, if nobody says how many
ROWS = 256  # tokens whose probabilities are computed at a time: a vocabulary of 100,000 is 100 MB of fp32


@dataclass(frozen=True)
class Perplexity:
    """Holds the perplexity (value), how many tokens were predicted, and in how many windows of how many tokens."""

    value: float
    tokens: int
    windows: int
    context: int


def perplexity(
    model: nn.Module,
    ids: Tensor,
    context: int | None = None,
    stride: int | None = None,
    progress: bool = True,
    kv: str | None = None,
) -> Perplexity:
    """Computes the perplexity of a text in windows of one length; what does not fill a last window is left out.

    The first window predicts its tokens but the first; each later one those that no window before it predicted, or, if
    windows do not overlap, its tokens but the first. A text that starts with the token that the model's config calls
    the beginning of a text (`bos_token_id`), as the tokenizers of Gemma and Llama put it, has it before every window.

    Args:
        model: called with `ids [1, context]`; returns logits `[1, context, vocabulary]`, or an object with `logits`.
        ids: `[T]` int64, the tokens of the text.
        context: tokens of a window, >= 2; default: 1024, or as many positions as the model has if those are fewer.
        stride: tokens of the text from one window's start to the next; default: all of a window. Smaller gives every
            token more context, and takes longer.
        kv: scheme of the keys and values that attention reads, of a language model of Transformers; None for that of
            the model's config, `none` for floats. With KIVI a window is read a group of tokens at a time, since those
            that a token sees as floats depend on where it is.

    Raises:
        ValueError: if the text is shorter than a window, the window or stride does not fit, a probability is NaN, or as
            `kv_cache`.
    """
    longest = _positions(model)
    context = min(CONTEXT, longest or CONTEXT) if context is None else context
    stride = context if stride is None else stride
    if context < 2 or context > (longest or context):
        most = f"in 2..{longest}" if longest else "at least 2"
        raise ValueError(f"perplexity: context must be {most}, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"perplexity: stride must be in 1..{context} (context), got {stride}")
    if ids.dim() != 1 or len(ids) < context:
        raise ValueError(
            f"perplexity: the text must fill a window of {context} tokens, got {ids.numel()}; give a smaller context"
        )
    first = ids[:1] if len(ids) and int(ids[0]) == _beginning(model) else ids[:0]
    text, size = ids[len(first) :], context - len(first)
    stride = min(stride, size)
    starts = range(0, len(text) - size + 1, stride)
    scheme = chosen_kv(model, kv, "perplexity")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in progress_bar(starts, "perplexity") if progress else starts:
            window = torch.cat((first, text[start : start + size])).to(device)
            scored = context - 1 if start == 0 else min(stride, context - 1)
            output = model(window[None]) if scheme is None else _through_cache(model, window, scheme)
            total += _surprise(output, window, scored)
            tokens += scored
    if math.isnan(total):
        raise ValueError("perplexity: the model must give probabilities, got NaN")
    mean = total / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, len(starts), context)


def _positions(model: nn.Module) -> int | None:
    """Returns how many positions a Transformers model has; None if that is unknown."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return limit if type(limit) is int and limit > 0 else None


def _beginning(model: nn.Module) -> int | None:
    """Returns the token that begins a text for a Transformers model; None if there is none."""
    token = getattr(_text_config(model), "bos_token_id", None)
    return token if type(token) is int else None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    # of a model that takes pictures too, the part that takes text
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _through_cache(model: Any, window: Tensor, kv: KVScheme) -> Tensor:
    """Returns the logits of a window whose keys and values go through a quantized cache."""
    cache = library("gs_algos.llm.kv_cache", "transformers").kv_cache(model, kv)
    options = {cache_argument(model): cache, "use_cache": True}
    parts = window[None].split(kv.group or len(window), 1)
    return torch.cat([model(input_ids=part, **options).logits for part in parts], 1)


def _surprise(output: Any, window: Tensor, scored: int) -> float:
    """Sums -log p over the last `scored` tokens of the window."""
    logits = getattr(output, "logits", output)[0, -scored - 1 : -1]  # [scored, vocabulary]
    target = window[-scored:]
    parts = (
        nn.functional.cross_entropy(logits[i : i + ROWS].float(), target[i : i + ROWS], reduction="sum")
        for i in range(0, scored, ROWS)
    )
    return sum(part.double().item() for part in parts)
