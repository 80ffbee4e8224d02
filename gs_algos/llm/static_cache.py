"""Makes key-value caches of fixed size, of Transformers' own layers, and says which models can decode with one."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor

from gs_algos.llm.libraries import library
from gs_algos.ptq.kv import KVScheme

ATTENTION = ("sdpa", "eager")  # implementations that mask the free part of the cache


def why_not_static(model: Any) -> str:
    """Says why a model cannot decode with a static cache; "" if it can."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name}, an encoder and decoder"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{name}, which Transformers does not decode with a static cache"
    names = set(inspect.signature(model.forward).parameters)
    if not {"cache", "past_key_values"} & names or "position_ids" not in names or getattr(model.config, "alibi", False):
        return f"{name}, which takes no cache with positions"  # ALiBi is made of the mask, one as long as the tokens
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in ATTENTION:
        return f"attention {attention!r}; load the model with attn_implementation='sdpa'"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "a model on several devices"
    layers = library("transformers.cache_utils")
    known = (layers.StaticLayer, layers.StaticSlidingWindowLayer, getattr(layers, "DummyLayer", layers.StaticLayer))
    try:
        kinds = {type(layer) for layer in layers.StaticCache(config=model.config, max_cache_len=1).layers}
    except KeyError as error:
        return f"{name}, with layers of type {error}"
    others = sorted(kind.__name__ for kind in kinds if kind not in known)
    return f"{name}, with a {others[0]}" if others else ""


def cache_argument(model: Any) -> str:
    """Returns the name of the argument in which a model takes a cache, by the version of Transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def static_cache(model: Any, length: int, whole: bool, kv: KVScheme | None = None) -> Any:
    """Makes Transformers' static cache, its layers all of this length.

    Args:
        whole: attention always reads all of it, so that shapes stay the same; else only the part in use.
        kv: how keys and values are quantized. KIVI takes only what is in use, and its memory grows.
    """
    layers = library("transformers.cache_utils")
    made = layers.StaticCache(config=model.config, max_cache_len=length)
    for i, layer in enumerate(made.layers):
        if type(layer) in (layers.StaticLayer, layers.StaticSlidingWindowLayer):
            made.layers[i] = _layer(length, whole, kv)
    return made


def _layer(length: int, whole: bool, kv: KVScheme | None) -> Any:
    if kv is None:
        kind = library("transformers.cache_utils").StaticLayer if whole else _part_layer()
        return kind(max_cache_len=length)
    from gs_algos.llm.kv_cache import QuantizedLayer, StaticQuantizedLayer

    return StaticQuantizedLayer(kv, length) if whole else QuantizedLayer(kv)


@cache
def _part_layer() -> Any:
    """Makes the class of static layers that show attention the part in use, which Python counts."""

    class PartLayer(library("transformers.cache_utils").StaticLayer):  # type: ignore[misc]
        is_compileable = False
        used = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            self.used += key_states.shape[-2]
            return keys[:, :, : self.used], values[:, :, : self.used]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.used + query_length, 0

        def get_seq_length(self) -> int:
            return self.used

        def reset(self) -> None:
            super().reset()
            self.used = 0

    return PartLayer


def counts_in_python(cache: Any) -> bool:
    """Says whether all layers of a cache are float ones that show the part in use, `used` tokens."""
    return all(type(layer) is _part_layer() for layer in cache.layers)


def lengths(cache: Any) -> list[Tensor]:
    """Lists the tensors in which the layers of a cache count what they hold."""
    return [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]


def refuse_length(model: Any, length: int, who: str) -> None:
    """Raises if the model looks positions up in a table that has fewer than `length`.

    Raises:
        ValueError: if it does.
    """
    positions: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    sizes = (getattr(m, "num_embeddings", None) for m in model.modules() if m is not words)
    # OPT's table has two rows more than positions
    if positions and length > positions and any(size is not None and 0 <= size - positions <= 2 for size in sizes):
        raise ValueError(
            f"{who}: the prompt and the new tokens must be at most {positions}, all positions that the model has, "
            f"got {length}; give a shorter prompt or fewer new tokens"
        )
