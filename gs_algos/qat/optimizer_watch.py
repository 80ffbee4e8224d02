"""Detects that no optimizer trains the parameters which `apply` added.

In most loops a tensor's version counter shows after one step that a parameter changes, which reads nothing from the
device. Fused optimizers, and those that write through `.data`, do not count versions: where no parameter seems to have
changed for a few steps, sums of the values are compared, once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gs_algos.qat.slb.search import local

GetParameters: TypeAlias = Callable[[], Sequence[nn.Parameter]]  # the current ones: FSDP2 replaces parameters
FIRST_CHECK = 3  # steps after which the values are compared
LAST_CHECK = 32  # and again, if no parameter at all had changed: a gradient scaler skips its first steps


class ChangeDetector:
    """Tells whether any of some parameters has changed since `start`, which the constructor calls.

    get_parameters: returns the current ones. Frozen ones (`requires_grad=False`) are passed over.
    """

    def __init__(self, get_parameters: GetParameters) -> None:
        self.get_parameters = get_parameters
        self.start()

    def start(self) -> None:
        """Takes the current values as those to compare with."""
        parameters = self.trainable()
        self.watched = [weakref.ref(p) for p in parameters]
        self.versions = [p._version for p in parameters]
        self.sums = _sums(parameters)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.get_parameters() if p.requires_grad]

    def replaced(self) -> bool:
        """Returns whether the parameters are other objects than at `start`."""
        now = self.trainable()
        return len(now) != len(self.watched) or any(ref() is not p for ref, p in zip(self.watched, now, strict=True))

    def version_changed(self) -> bool:
        """Returns whether a version counter has moved; reads nothing from the device."""
        return self.versions != [p._version for p in self.trainable()]

    def changed(self) -> bool:
        """Returns whether a value has changed; reads from the device if no version counter has moved."""
        sums = zip(self.sums, _sums(self.trainable()), strict=True)
        return self.version_changed() or not all(torch.equal(old.to(new.device), new) for old, new in sums)


class GradientDetector:
    """Tells whether parameters received gradients since `start`, also if those are dropped before one can look.

    get_parameters: returns the current ones. Frozen ones are passed over.
    """

    def __init__(self, get_parameters: GetParameters) -> None:
        self.get_parameters = get_parameters
        self.received = _ReceivedGradients()
        self.handles: list[RemovableHandle] = []
        self.start()

    def start(self) -> None:
        """Begins anew with hooks on the current parameters."""
        self.stop()
        self.received = _ReceivedGradients()
        trainable = [p for p in self.get_parameters() if p.requires_grad]
        self.handles = [p.register_post_accumulate_grad_hook(self.received) for p in trainable]

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def any_received(self) -> bool:
        """Returns whether a gradient came, or is there now. Reads nothing from the device."""
        trainable = (p for p in self.get_parameters() if p.requires_grad)
        self.received.any = self.received.any or any(p.grad is not None for p in trainable)
        return self.received.any

    def all_finite(self) -> bool:
        """Returns False if a parameter's last gradient is NaN or Inf, as under a gradient scaler now and then."""
        return all(bool(finite) for finite in self.received.finite.values())


class _ReceivedGradients:
    """Notes which parameters receive gradients, as a hook. It holds no parameter: they hold it."""

    def __init__(self) -> None:
        self.any, self.finite = False, dict[int, Tensor]()

    def __call__(self, parameter: Tensor) -> None:
        self.any = True
        if parameter.grad is not None:
            self.finite[id(parameter)] = local(parameter.grad).isfinite().all()


class TrainingWatch:
    """Watches added parameters until one changes, and other parameters that show whether the network trains at all.

    use_gradients: gradients that arrive at the added parameters count as training too, if the others stand still.
    """

    def __init__(self, added: GetParameters, others: GetParameters, use_gradients: bool = False) -> None:
        self.added, self.others = ChangeDetector(added), ChangeDetector(others)
        self.gradients = GradientDetector(added if use_gradients else list)
        self.ended = False
        self._reset()

    def __getstate__(self) -> dict[str, bool]:
        """Leaves out what is watched: a copied or pickled algorithm watches nothing."""
        return {"ended": True}

    def _reset(self) -> None:
        self.steps, self.found_untrained = 0, False

    def start(self) -> None:
        """Begins anew from the current values, as after a calibration that has set them."""
        if not self.ended:
            self.added.start()
            self.others.start()
            self.gradients.start()
            self._reset()

    def untrained(self, last: bool = False) -> bool:
        """Returns whether the added parameters stand still while the network trains. Call it once after each step.

        last: no later step could tell.
        """
        if self.ended:
            return False
        if self.added.replaced() or self.others.replaced():
            self.start()
            return False
        if not self.added.watched or self.added.version_changed():
            self.end()
            return False
        self.steps += 1
        self.gradients.any_received()
        if self.steps in (FIRST_CHECK, LAST_CHECK) or last:
            self._compare_values(last)
        return self.found_untrained

    def end(self) -> None:
        """Stops watching for good."""
        self.ended = True
        self.gradients.stop()

    def _compare_values(self, last: bool) -> None:
        if self.added.changed():
            self.end()
            return
        late = last or self.steps >= LAST_CHECK
        unused = self.gradients.any_received() and (late or not self.others.watched) and self._all_finite()
        self.found_untrained = self.others.changed() or unused
        if late and not self.found_untrained:
            self.end()

    def _all_finite(self) -> bool:
        """Returns False where a gradient scaler will have skipped the step."""
        grads = [p.grad for p in (*self.added.trainable(), *self.others.trainable()) if p.grad is not None]
        return self.gradients.all_finite() and all(bool(local(grad).isfinite().all()) for grad in grads)


@torch.no_grad()
def _sums(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Sums up each parameter and its magnitudes, `[2]` on its device, in the widest float that the device has."""
    sums = []
    for p in parameters:
        wide = torch.float64 if p.device.type in ("cpu", "cuda") else torch.float32
        flat = local(p).flatten()
        sums.append(torch.stack([flat.sum(dtype=wide), flat.abs().sum(dtype=wide)]))
    return sums
