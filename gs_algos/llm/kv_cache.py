"""Makes caches of Transformers that hold keys and values as codes and scales, and has `generate` use them.

A token is rounded as it is written, and attention reads what the cache holds, of the new tokens too; with KIVI the new
ones are read as floats, and rounded when they are no longer among the last. Layers with a sliding window hold only the
window. Recurrent states, and windows under KIVI, stay floats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from gs_algos.core.modules import swapped_class
from gs_algos.llm.kv_store import Store, TokenStore, stores
from gs_algos.ptq.kv import KVScheme, recorded_kv, refuse_without_cache

logger = logging.getLogger(__name__)

WHO = "kv_cache"
NAMES = ("cache", "past_key_values")  # of the argument that takes a cache, by version of Transformers
GROWING = (None, "dynamic")  # values of cache_implementation that ask for a cache that grows


class _Quantized:
    """Holds keys and values of a layer in stores; `keys` and `values` of Transformers stay None."""

    scheme: KVScheme
    held: tuple[Store, Store] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.held = stores(self.scheme, key_states, value_states, WHO)
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else sum(store.nbytes for store in self.held)

    @property
    def tokens(self) -> int:
        return 0 if self.held is None else self.held[0].tokens

    def _appended(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new tokens and returns all of them."""
        if self.held is None:
            self.lazy_initialization(key_states, value_states)
        assert self.held is not None
        states = (key_states, value_states)
        for store, x in zip(self.held, states, strict=True):
            store.append(x)
        keys, values = (store.read(x.dtype) for store, x in zip(self.held, states, strict=True))
        for store in self.held:
            store.settle()
        return keys, values

    def reset(self) -> None:
        self.held, self.is_initialized = None, False
        super().reset()  # type: ignore[misc]

    def _cropped(self, count: int) -> None:
        for store in self.held or ():
            store.crop(count)

    def _take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        for store in self.held or ():
            store.take_rows(take)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._take_rows(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._take_rows(lambda t: t.to(self.device, non_blocking=True))


class QuantizedLayer(_Quantized, DynamicLayer):  # type: ignore[misc]
    """Is a layer of a cache that grows."""

    def __init__(self, scheme: KVScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.is_croppable = not scheme.group  # KIVI has rounded what a crop should give back as floats

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._appended(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.tokens

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"{WHO}: crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self._cropped(-tokens_to_remove)


class QuantizedSlidingLayer(_Quantized, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Is a layer with a sliding window: the last tokens by a scheme by token."""

    def __init__(self, scheme: KVScheme, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.scheme = scheme

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        keys, values = self._appended(key_states, value_states)
        if not self.record_past:
            self._keep_window()
            return keys, values
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _keep_window(self) -> None:
        for store in self.held or ():
            assert isinstance(store, TokenStore)
            store.keep_last(self.sliding_window - 1)

    def crop(self, tokens_to_remove: int) -> None:
        full = self.get_seq_length() >= self.sliding_window
        if tokens_to_remove > 0 or (full and not self.record_past):
            raise RuntimeError(
                f"{WHO}: crop takes minus the number of tokens, and a full window needs activate_past_recording before "
                f"the tokens come, got {tokens_to_remove}"
            )
        self._cropped(-tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        if full:
            self._keep_window()


class StaticQuantizedLayer(_Quantized, StaticLayer):  # type: ignore[misc]
    """Is a layer of fixed size, by a scheme by token, whose length is counted on the device."""

    def __init__(self, scheme: KVScheme, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.scheme = scheme

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.held = stores(self.scheme, key_states, value_states, WHO, self.max_cache_len)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.held is None:
            self.lazy_initialization(key_states, value_states)
        assert self.held is not None
        read = []
        for store, x in zip(self.held, (key_states, value_states), strict=True):
            assert isinstance(store, TokenStore)
            store.write_at(x, self.cumulative_length)
            read.append(store.read_all(x.dtype))
        self.cumulative_length.add_(key_states.shape[-2])
        return read[0], read[1]

    def reset(self) -> None:
        for store in self.held or ():
            assert isinstance(store, TokenStore)
            store.clear()
        self.cumulative_length.zero_()


class QuantizedKVCache(DynamicCache):
    """Is a cache that grows, with quantized keys and values; `kv_cache` makes one.

    nbytes: of all that it holds now. layers without a cache of tokens are those of Transformers.
    """

    def __init__(self, model: Any, scheme: KVScheme) -> None:
        super().__init__(config=model.config)
        kinds = [type(layer) for layer in self.layers]
        self.scheme = scheme
        self.layers = [_quantized(layer, scheme) for layer in self.layers]
        floats = [i for i, layer in enumerate(self.layers) if not isinstance(layer, _Quantized)]
        names = ", ".join(sorted({kinds[i].__name__ for i in floats}))
        if len(floats) == len(self.layers):
            raise ValueError(f"{WHO}: {scheme} needs a layer with a cache of tokens, got only {names}; use kv=None")
        if floats:
            logger.info("%s: %d of %d layers stay float: %s", WHO, len(floats), len(self.layers), names)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(layer) for layer in self.layers)


def _quantized(layer: Any, scheme: KVScheme) -> Any:
    """Returns a quantized layer in place of one of Transformers; the same where there is none."""
    if type(layer) is DynamicLayer:
        return QuantizedLayer(scheme)
    if type(layer) is DynamicSlidingWindowLayer and not scheme.group:
        return QuantizedSlidingLayer(scheme, layer.sliding_window)
    return layer


def _nbytes(layer: Any) -> int:
    if isinstance(layer, _Quantized):
        return layer.nbytes
    return sum(t.nbytes for t in (layer.keys, layer.values) if isinstance(t, Tensor)) if hasattr(layer, "keys") else 0


def kv_cache(model: Any, kv: str | KVScheme) -> QuantizedKVCache:
    """Makes an empty cache for a language model, which holds its keys and values quantized.

    `model.generate(**inputs, cache=kv_cache(model, "int8@token"))` decodes with it, and so does a call of the model.

    Args:
        model: a causal language model of Transformers.
        kv: `int8@token`, `int4@token`, `int4@kivi:32` or `int2@kivi:32`.

    Raises:
        ValueError: if there is no such scheme, the model has no cache that it fits, or an encoder.
    """
    scheme = KVScheme.parse(kv, WHO)
    refuse_without_cache(model, scheme, WHO)
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"{WHO}: {scheme} needs a cache of tokens, got {type(model).__name__}, which makes its own")
    return QuantizedKVCache(model, scheme)


class GeneratesQuantized:
    """Has `generate` of a model make the cache that its config asks for; stands in front of the model's class."""

    prefix = ""  # of the class's name: AutoModel and save_pretrained go by it

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = next((name for name in NAMES if model_kwargs.get(name) is not None), None)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore
        scheme = recorded_kv(self)
        made = next((name for name in NAMES if model_kwargs.get(name) is not None), None)
        asked = generation_config.cache_implementation
        if scheme is None or isinstance(model_kwargs.get(given or ""), QuantizedKVCache):
            return result
        if given is not None or made is None or asked not in GROWING:
            why = "no cache is used" if made is None else f"the {type(model_kwargs[made]).__name__} asked for is used"
            logger.warning("generate: keys and values stay float, not %s: %s", scheme, why)
            return result
        model_kwargs[made] = kv_cache(self, scheme)
        if getattr(generation_config, "is_assistant", False):
            model_kwargs[made].activate_past_recording()
        return result


def generates_quantized(model: Any) -> None:
    """Has `model.generate` make the cache that the model's config asks for."""
    if hasattr(model, "_prepare_cache_for_generation") and not isinstance(model, GeneratesQuantized):
        model.__class__ = swapped_class(GeneratesQuantized, type(model))  # type: ignore[arg-type]
