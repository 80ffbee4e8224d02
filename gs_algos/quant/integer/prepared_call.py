"""Prepares the part of a packed layer's call that does not depend on values once: it is most of a small layer's time.

It is good for inputs of one shape, stride order, dtype and device, while the tensors it was made from are unchanged.
What runs then, on this device, is a function of the values that gs_kernels made.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gs_algos.quant.integer.quantized_tensor import HANDED_ON, Like
from gs_kernels.for_layers import OperationCall, recording
from gs_kernels.runtime.dispatch import backend_setting
from gs_kernels.runtime.torch_private import PLAIN, autocasts, is_plain_call

MAX_ENTRIES = 64  # of one layer, which may see images of ever new sizes
PREPARED = "_prepared_calls"  # attribute of a layer
_buffers, _version = attrgetter("_buffers"), attrgetter("_version")
_chain = chain.from_iterable


class PreparedConv(NamedTuple):
    """Computes a convolution for images of one shape, up to the strides of its result.

    Args:
        run: takes what `operand` gives and, if one was named, a residual as `ConvolvesImages` does.
        operand: makes of an image what is convolved: codes or floats.
        output: what the layer does to floats; None if nothing.
        grid: of the codes that the layer gives; None if it gives floats.
        like: shape, strides, dtype and device of the result.
        on_integers: whether `run` takes codes, also as a residual.
    """

    run: Callable[..., Tensor]
    operand: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor] | None
    grid: Any
    like: Like
    on_integers: bool = False

    def __call__(self, x: Tensor, *residual: Tensor | None) -> Tensor:
        """Returns codes on `grid`, or floats."""
        x = self.operand(x)
        y = self.run(x, *residual)
        if recording.calls is not None and not self.on_integers:  # kernels of integers note themselves
            recording.calls.append(OperationCall(self.run, (x, *residual), {}, y))
        return y if self.output is None else self.output(y)


class _Entry(NamedTuple):
    others: tuple[nn.Module, ...]
    held: list[Tensor | None]
    tensors: list[Tensor]
    versions: list[int]
    value: Any


def kind_of(x: Tensor) -> tuple[Any, ...] | None:
    """Returns what a prepared call depends on in its input; None under tracers, gradients and autocast."""
    if autocasts() or not is_plain_call(x, plain=HANDED_ON):
        return None
    kind = type(x)
    like = (x.shape, x.stride(), x.dtype, x.device) if kind in PLAIN else x.like  # type: ignore[attr-defined]
    return kind, like, backend_setting()


def cached(layer: nn.Module, key: Any, others: tuple[nn.Module, ...], make: Callable[..., Any], *args: Any) -> Any:
    """Returns what `make(*args)` gives, made again when a buffer of the layer or of others was replaced or changed.

    Returns None where changes cannot be seen (tensors of inference mode). key: tells the entries of one layer apart.
    What make gives must not hold the layer, which would keep its memory for the garbage collector.
    """
    entries: dict[Any, _Entry] | None = layer.__dict__.get(PREPARED)
    entry = None if entries is None else entries.get(key)
    modules = (layer, *others)
    if (
        entry is not None
        and entry.others == others
        and all(map(is_, entry.held, _chain(map(dict.values, map(_buffers, modules)))))
        and [*map(_version, entry.tensors)] == entry.versions
    ):
        return entry.value
    held = [*_chain(map(dict.values, map(_buffers, modules)))]
    if entries is not None and (entry is not None or len(entries) >= MAX_ENTRIES):
        entries.clear()  # the others, too, hold what was made of former tensors
    tensors = [t for t in held if t is not None]
    if any(t.is_inference() for t in tensors):
        return None
    with torch.inference_mode(False), torch.no_grad():
        value = make(*args)
    layer.__dict__.setdefault(PREPARED, {})[key] = _Entry(others, held, tensors, [t._version for t in tensors], value)
    return value
