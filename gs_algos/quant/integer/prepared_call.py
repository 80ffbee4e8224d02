"""Prepares the part of an integer layer's call that does not depend on values once: it is most of a small layer's time.

It is good for inputs of one shape, stride order and dtype, while the tensors it was made from are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_kernels.for_layers import Int8Convolution

MAX_ENTRIES = 64  # of one layer, which may see images of ever new sizes
_version = attrgetter("_version")


@dataclass(frozen=True)
class PreparedConv:
    """Holds the prepared call of a convolution for images of one shape.

    Args:
        run: the convolution.
        grid: of the codes that the layer gives; None if it gives floats.
        limits: the smallest and largest of these codes; None if they are those of int8.
        strides: of the result.
    """

    run: Int8Convolution
    grid: StaticQuantizer | None
    limits: tuple[int, int] | None
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    ids: list[int]
    tensors: list[Tensor]
    versions: list[int]
    value: Any


# beside the layers, not in them: a copy of a layer makes its own
_cache: WeakKeyDictionary[nn.Module, dict[Any, _Entry]] = WeakKeyDictionary()


def cached(layer: nn.Module, key: Any, modules: Sequence[nn.Module | None], make: Callable[[], Any]) -> Any:
    """Returns what `make` gives, made again when a buffer of these modules was replaced or changed.

    Returns None where changes cannot be seen (tensors of inference mode). key: tells the entries of one layer apart.
    """
    entries = _cache.get(layer)
    entry = None if entries is None else entries.get(key)
    ids = [id(t) for m in modules if m is not None for t in m._buffers.values()]
    if entry is not None and entry.ids == ids and list(map(_version, entry.tensors)) == entry.versions:
        return entry.value
    tensors = [t for m in modules if m is not None for t in m._buffers.values() if t is not None]
    if any(t.is_inference() for t in tensors):
        return None
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    entries = _cache.setdefault(layer, {})
    if len(entries) >= MAX_ENTRIES:
        entries.clear()
    entries[key] = _Entry(ids, tensors, [t._version for t in tensors], value)
    return value
