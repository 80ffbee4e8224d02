"""What of an integer convolution's call does not depend on values, made once: most of what a small layer takes is that.

It holds for images of one shape, order and dtype, as long as the tensors that it was made of are there and unchanged.
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
from gs_kernels.prepared import Int8Convolution

MAX_ENTRIES = 64  # entries that a layer remembers: it may see images of ever new sizes
_version = attrgetter("_version")


@dataclass(frozen=True)
class PreparedConv:
    """A layer's call for one kind of image.

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
    what: Any


# beside the layers, not in them: a copy of a layer makes its own
_cache: WeakKeyDictionary[nn.Module, dict[Any, _Entry]] = WeakKeyDictionary()


def cached(layer: nn.Module, key: Any, parts: Sequence[nn.Module | None], make: Callable[[], Any]) -> Any:
    """What `make` gives, made again when a buffer of these parts is another, or has changed.

    key: what tells apart the things of one layer. None, as from `make`, if changes cannot be seen.
    """
    things = _cache.get(layer)
    found = None if things is None else things.get(key)
    ids = [id(t) for part in parts if part is not None for t in part._buffers.values()]
    if found is not None and found.ids == ids and list(map(_version, found.tensors)) == found.versions:
        return found.what
    tensors = [t for part in parts if part is not None for t in part._buffers.values() if t is not None]
    if any(t.is_inference() for t in tensors):
        return None
    with torch.inference_mode(False), torch.no_grad():
        what = make()
    things = _cache.setdefault(layer, {})
    if len(things) >= MAX_ENTRIES:
        things.clear()
    things[key] = _Entry(ids, tensors, [t._version for t in tensors], what)
    return what
