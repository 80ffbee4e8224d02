"""Caches forms that are computed from a packed weight, such as its int8 codes, for as long as the weight lives."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight

logger = logging.getLogger(__name__)

T = TypeVar("T")

# by storage and offset of the codes, and kind: the state of the weight, owners of its tensors, the derived form
_forms: dict[tuple[int, int, Hashable], tuple[list[Any], list[Any], Any]] = {}
_logged = False


class UnsuitableError(RuntimeError):
    """Says that a faster way cannot run here; the caller takes plain tensor operations."""


def derived(weight: PackedWeight, kind: Hashable, build: Callable[[PackedWeight], T]) -> T:
    """Returns `build(weight)`, cached by kind while the codes live, and built again when a tensor has changed.

    Changes of its tensors through `.data` or numpy go unnoticed: do not make them.

    Raises:
        UnsuitableError: if a tensor does not count its changes, as those made in inference mode.
    """
    storage = weight.codes.untyped_storage()
    key = (id(storage), int(weight.codes.storage_offset()), kind)
    state: list[Any] = [weight.bits, weight.shape, weight.group_size, weight.layout]
    owners = []
    for t in (weight.codes, weight.scale, weight.zero, weight.levels, weight.divisor):
        if not isinstance(t, Tensor):
            state.append(t)
        elif t.is_inference():
            _log_untracked()
            raise UnsuitableError("a tensor was made in inference mode")
        else:
            state += (t._version, t.storage_offset(), t.stride(), t.dtype)
            owners.append(t.untyped_storage())
    entry = _forms.get(key)
    if entry is not None and entry[0] == state:
        for ref, owner in zip(entry[1], owners, strict=True):
            if ref() is not owner:
                break
        else:
            return entry[2]
    # ordinary tensors even in inference mode: compiled code would be compiled again for others
    with torch.inference_mode(False), torch.no_grad():
        form = build(weight)
    # a storage that dies takes its entry along, before another can have its address
    refs = [weakref.ref(storage, lambda _: _forms.pop(key, None)), *map(weakref.ref, owners[1:])]
    _forms[key] = (state, refs, form)
    return form  # type: ignore[no-any-return]


def _log_untracked() -> None:
    global _logged
    if not _logged:
        _logged = True
        logger.info(
            "qmatmul dequantizes a weight in every call: its tensors were made in inference mode and do not tell when"
            " they change; load it outside"
        )
