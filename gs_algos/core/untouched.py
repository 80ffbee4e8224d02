"""Runs a model without leaving a trace: flags, classes, attributes, buffers and random state come back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Runs the block without gradients, in one mode; afterwards the model and the random state are as they were.

    Training flags are set one by one, because a model may override `train` (frozen batch norms, merged adapters).
    Attributes that forward sets or deletes (caches, last attention maps) are put back, one level deep in containers.
    """
    modules = list(model.modules())
    attributes = [(module, dict(module.__dict__)) for module in modules]
    classes = [type(module) for module in modules]
    containers = [(value, _copy(value)) for _, saved in attributes for value in saved.values() if _is_container(value)]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference() and not b.is_meta]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []), torch.no_grad():
            for module in modules:
                module.training = training
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for (module, saved), own in zip(attributes, classes, strict=True):
            if type(module) is not own:
                module.__class__ = own
            module.__dict__.clear()
            module.__dict__.update(saved)
        for value, saved in containers:
            _restore(value, saved)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def _copy(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _restore(value: Any, saved: list[Any]) -> None:
    now = _copy(value)
    if len(now) == len(saved) and all(_same(a, b) for a, b in zip(now, saved, strict=True)):
        return
    value.clear()
    if isinstance(value, list):
        value.extend(saved)
    else:
        value.update(saved)


def _same(a: Any, b: Any) -> bool:
    return a is b or (
        isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1]
    )
