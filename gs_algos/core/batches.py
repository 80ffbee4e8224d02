"""Takes the inputs of a model from the batches of a data loader, without the labels."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, InputsError, split_inputs
from gs_algos.core.network import network_of
from gs_kernels.runtime.torch_private import tree_leaves, tree_map_only

logger = logging.getLogger(__name__)


def checked_batches(who: str, batches: Any) -> Iterable[Any]:
    """Returns the batches, checked: several, which can be iterated over.

    Raises:
        TypeError: if they are no iterable.
        ValueError: if they are the inputs of one call.
    """
    if isinstance(batches, Tensor | Mapping):
        got = f"one tensor of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else "one mapping"
        raise ValueError(
            f"{who}: the inputs must run through the model batch by batch, got {got}; give a list, [inputs]"
        )
    if callable(batches) and not hasattr(batches, "__iter__"):
        raise TypeError(f"{who}: batches must be an iterable of inputs, got a function; give forward_loop=")
    if isinstance(batches, str | bytes) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"{who}: batches must be an iterable of inputs, such as a DataLoader, got {type(batches).__name__}"
        )
    return batches


@runtime_checkable
class NumberedBatches(Protocol):
    """Marks what makes the batch of a number, the same each time: a generator of images, as one of data has it."""

    def batch(self, number: int) -> Inputs:
        """Makes the inputs of this number."""
        ...


def device_of(model: nn.Module) -> torch.device | None:
    """Returns the device of the first parameter or buffer; None if there is none."""
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)


def on_device(inputs: Inputs, device: torch.device | None) -> Inputs:
    """Moves the tensors of inputs; None leaves them where they are."""
    return inputs if device is None else tree_map_only(Tensor, lambda t: t.to(device), inputs)  # type: ignore[no-any-return]


def samples_of(inputs: Inputs) -> int:
    """Returns how many samples the inputs of a call hold: the size of the first axis of the first tensor."""
    first = tensor_in(inputs)
    return len(first) if first.dim() else 1


def refuse_without_tensor(inputs: Inputs, who: str) -> None:
    """Raises InputsError if inputs hold no tensor."""
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise InputsError(who, f"the inputs must hold a tensor, got {type(inputs).__name__}")


def refuse_empty(inputs: Inputs, who: str) -> None:
    """Raises InputsError if inputs hold no tensor, or no sample."""
    refuse_without_tensor(inputs, who)
    if not samples_of(inputs):
        raise InputsError(who, "the inputs must hold at least one sample, got an empty batch")


def resized(inputs: Inputs, samples: int) -> Inputs:
    """Returns inputs with so many samples: the first ones, from the start again where there are too few."""
    held = samples_of(inputs)

    def take(t: Tensor) -> Tensor:
        whole = not t.dim() or len(t) != held or samples == held
        return t if whole else t[torch.arange(samples, device=t.device) % held]

    return tree_map_only(Tensor, take, inputs)  # type: ignore[no-any-return]


def tensor_in(values: Any) -> Tensor:
    """Returns the first tensor in the arguments of a call, or in what it returned; there must be one."""
    return next(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class InputsOf:
    """Gives the part of a batch that a model takes: all of it, or what of `(x, y)` has the form of the example inputs.

    A batch whose whole the model would take, though it has another form than the example, is refused: labels must not
    pass for a mask.

    Args:
        example: inputs the model is known to take; None if none are known.
    """

    def __init__(self, who: str, model: nn.Module, example: Inputs | None) -> None:
        self.who, self.example, self.logged = who, example, False
        try:
            self.signature: inspect.Signature | None = inspect.signature(network_of(model, who).forward)
        except (TypeError, ValueError):  # a forward without a signature takes whatever it takes
            self.signature = None

    def __call__(self, batch: Any) -> Inputs:
        """Returns the inputs of a batch.

        Raises:
            ValueError: if it is not clear which part of the batch is meant.
        """
        whole = self._binds(batch)
        if isinstance(batch, Mapping):
            return self._of_mapping(batch, whole)
        if not isinstance(batch, tuple | list) or not batch or self._fits(batch, whole):
            return batch
        part, words = self._part(batch)
        if part is None:
            return batch
        if whole and self.example is not None and _same_form(batch[0], split_inputs(self.example)[0][0]):
            raise ValueError(
                f"{self.who}: a batch must have the form of the example inputs, got {len(batch)} elements, which "
                f"forward{self.signature} would take all; give the inputs alone, or a dict of the arguments"
            )
        self._log_once(f"takes {words} of each batch of {len(batch)} elements")
        return part

    def _of_mapping(self, batch: Mapping[str, Any], whole: bool) -> Inputs:
        if whole:
            return batch
        keys = self.example.keys() if isinstance(self.example, Mapping) else ()
        if keys and keys <= batch.keys():
            self._log_once(f"takes {', '.join(keys)} of each batch and leaves {', '.join(batch.keys() - keys)}")
            return {key: batch[key] for key in keys}
        names = ", ".join(map(str, batch))
        raise ValueError(
            f"{self.who}: a batch must be inputs of the model, got a mapping of {names} for forward{self.signature}; "
            f"give the inputs alone, (batch[{next(iter(batch), 'x')!r}] for batch in batches)"
        )

    def _part(self, batch: Any) -> tuple[Any, str]:
        """Returns (the part that is meant, its description), or (None, "")."""
        if self.example is None:
            return (batch[0], "the first element") if self._binds(batch[0]) else (None, "")
        if _same_form(batch[0], self.example):
            return batch[0], "the first element"
        count = len(split_inputs(self.example)[0])
        if 0 < count < len(batch) and _same_form(batch[:count], self.example):
            return batch[:count], f"the first {count} elements"
        return None, ""

    def _fits(self, batch: Any, whole: bool) -> bool:
        return whole if self.example is None else _same_form(batch, self.example)

    def _binds(self, inputs: Any) -> bool:
        """Returns whether the forward accepts these inputs."""
        args, kwargs = split_inputs(inputs)
        try:
            if self.signature is not None:
                self.signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _log_once(self, what: str) -> None:
        if not self.logged:
            logger.info("%s: %s", self.who, what)
            self.logged = True


def _same_form(a: Any, b: Any) -> bool:
    """Returns whether two inputs are alike: tensors of one kind of numbers in the same containers."""
    a, b = (tuple(x) if isinstance(x, tuple | list) else x for x in (a, b))
    if isinstance(a, tuple) != isinstance(b, tuple):  # one input, and a tuple of one
        a, b = (x[0] if isinstance(x, tuple) and len(x) == 1 else x for x in (a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.is_floating_point() == b.is_floating_point()
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_form, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_form(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, Tensor | tuple)
