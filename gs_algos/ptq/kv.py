"""Names how keys and values of a language model's cache are quantized, and says which networks have a cache.

int8@token      a scale for each token and head, max abs / 127, found as the token is written
int4@token      the same with 4 bits and groups of 64, behind a Hadamard rotation (QuaRot, arXiv:2404.00456); the
                number that is largest in size, of either sign, is -8 times the scale
int2@kivi:32    keys in groups of 32 tokens of a channel, values in groups of 32 channels of a token, with a scale
                and a minimum each; the last 128 tokens stay float (KIVI, Liu et al. 2024, arXiv:2402.02750).
                Differs from the paper: values are rotated first, in SmolLM2-135M perplexity 8.76 to 8.36 (float 7.28)
int4@kivi:32    the same with 4 bits
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

TOKEN_GROUP = 64  # elements that share a scale of 4 bits, if they divide a head; else the largest divisor below
RECENT = 128  # tokens that KIVI leaves float
FORMS = "int8@token, int4@token, int4@kivi:32 or int2@kivi:32"


@dataclass(frozen=True)
class KVScheme:
    """Describes how keys and values are quantized.

    Args:
        bits: 8 or 4 by token, 4 or 2 by KIVI.
        group: 0 by token; of KIVI, the tokens of a key's channel and the channels of a value that share a scale.
    """

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}@kivi:{self.group}" if self.group else f"int{self.bits}@token"

    @staticmethod
    def parse(text: str | KVScheme, who: str = "PTQ") -> KVScheme:
        """Reads the text form.

        Raises:
            ValueError: if it is none of the schemes.
        """
        if isinstance(text, KVScheme):
            return text
        match = re.fullmatch(r"int(8|4)@token|int(4|2)@kivi:(\d{1,6})", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{who}: kv must be {FORMS}, got {text!r:.60}")
        if match[1]:
            return KVScheme(int(match[1]))
        group = int(match[3])
        if group < 2 or RECENT % group:
            raise ValueError(f"{who}: the group of {text} must divide the {RECENT} recent tokens, got {group}; use 32")
        return KVScheme(int(match[2]), group)

    def refuse_head(self, size: int, who: str) -> None:
        """Raises ValueError if heads of this size cannot be cut into the groups of values."""
        if self.group and size % self.group:
            raise ValueError(
                f"{who}: the group of {self} must divide the size of a head, got {self.group} and {size}; use another "
                "group, or int4@token"
            )

    def groups(self, size: int) -> int:
        """Returns how many scales a token of a head has, by token."""
        if self.bits == 8:
            return 1
        return next(size // group for group in range(min(TOKEN_GROUP, size), 0, -1) if size % group == 0)


def chosen_kv(model: Any, kv: str | None, who: str) -> KVScheme | None:
    """Returns the scheme of a model's cache.

    kv: None for that of the model's config, `none` for floats.

    Raises:
        ValueError: if there is no such scheme.
    """
    scheme = recorded_kv(model) if kv is None else None if kv == "none" else kv
    return None if scheme is None else KVScheme.parse(scheme, who)


def elsewhere(kv: str, engine: str) -> str:
    """Says what becomes of a scheme in another engine, which makes caches of its own."""
    return f"keys and values are not {kv} there: {engine} makes a cache of its own"


def recorded_kv(model: Any) -> str | None:
    """Returns the scheme that a model was quantized with, of its config; None if there is none."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    found = settings.get("kv") if isinstance(settings, dict) else getattr(settings, "kv", None)
    return found if isinstance(found, str) else None


def refuse_without_cache(model: nn.Module, scheme: KVScheme, who: str) -> None:
    """Raises unless the network is a language model of Transformers whose cache the scheme can quantize.

    Raises:
        ValueError: if it is not.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "_prepare_cache_for_generation") or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"{who}: kv quantizes the cache of a language model of Transformers, got a {type(model).__name__} without "
            "one; use kv=None"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{who}: kv takes decoders, got {type(model).__name__}, an encoder and decoder; use kv=None")
    text = config.get_text_config()
    size, heads = getattr(text, "head_dim", None), getattr(text, "num_attention_heads", None)
    if not isinstance(size, int) and isinstance(heads, int) and heads > 0:
        size = text.hidden_size // heads
    if isinstance(size, int):
        scheme.refuse_head(size, who)
