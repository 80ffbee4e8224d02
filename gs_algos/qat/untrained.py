"""Notices that no optimizer trains the parameters which `apply` added.

In most loops the count that a tensor keeps of its changes shows after one step that they move, which reads nothing from
the device. Fused optimizers, and those that write through `.data`, are not counted: where nothing seems to have moved
for a few steps, sums of the values are compared, once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gs_algos.qat.slb.search import local

Parameters: TypeAlias = Callable[[], Sequence[nn.Parameter]]  # those of now: FSDP2 puts others in their place
FEW = 3  # steps after which the values are looked at
MANY = 32  # and again, if nothing at all had moved: a gradient scaler skips its first steps


class Moves:
    """Whether one of some parameters has changed since this was made.

    parameters: gives those of now. Frozen ones (`requires_grad=False`) are passed over.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.start()

    def start(self) -> None:
        """Begins anew from the values of now."""
        now = self.now()
        self.known = [weakref.ref(p) for p in now]
        self.versions = [p._version for p in now]
        self.sums = _sums(now)

    def now(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def replaced(self) -> bool:
        """Whether they are other objects by now."""
        now = self.now()
        return len(now) != len(self.known) or any(ref() is not p for ref, p in zip(self.known, now, strict=True))

    def counted(self) -> bool:
        """True if a change was counted; nothing is read from the device."""
        return self.versions != [p._version for p in self.now()]

    def moved(self) -> bool:
        """True if a value has changed; reads from the device if no change was counted."""
        now = _sums(self.now())
        return self.counted() or not all(torch.equal(a.to(b.device), b) for a, b in zip(self.sums, now, strict=True))


class Gradients:
    """Whether parameters were given gradients since this was made, also where they are dropped before one can look.

    parameters: gives those of now. Frozen ones are passed over.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.given = _Given()
        self.handles: list[RemovableHandle] = []
        self.start()

    def start(self) -> None:
        """Begins anew with the parameters of now."""
        self.stop()
        self.given = _Given()
        now = [p for p in self.parameters() if p.requires_grad]
        self.handles = [p.register_post_accumulate_grad_hook(self.given) for p in now]

    def stop(self) -> None:
        """Takes the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def seen(self) -> bool:
        """True if a gradient was given, or is there. Reads nothing from the device."""
        self.given.any = self.given.any or any(p.grad is not None for p in self.parameters() if p.requires_grad)
        return self.given.any

    def finite(self) -> bool:
        """False if one that was last given is NaN or Inf, as a gradient scaler has them now and then."""
        return all(bool(right) for right in self.given.finite.values())


class _Given:
    """What a hook on parameters notes of their gradients. It holds no parameter: they hold it."""

    def __init__(self) -> None:
        self.any, self.finite = False, dict[int, Tensor]()

    def __call__(self, parameter: Tensor) -> None:
        self.any = True
        if parameter.grad is not None:
            self.finite[id(parameter)] = local(parameter.grad).isfinite().all()


class Watch:
    """Follows parameters that were added, until they move, and others that show whether the network is trained at all.

    graded: gradients that nothing makes use of show it too, where the others stand still.
    """

    def __init__(self, added: Parameters, others: Parameters, graded: bool = False) -> None:
        self.added, self.others = Moves(added), Moves(others)
        self.gradients = Gradients(added if graded else list)
        self.over = False
        self._begin()

    def __getstate__(self) -> dict[str, bool]:
        """Of a copied or pickled algorithm nothing is watched."""
        return {"over": True}

    def _begin(self) -> None:
        self.steps, self.found = 0, False

    def start(self) -> None:
        """Begins anew from the values of now, as after a calibration that has set them."""
        if not self.over:
            self.added.start()
            self.others.start()
            self.gradients.start()
            self._begin()

    def idle(self, last: bool = False) -> bool:
        """Whether the added parameters stand still while the network is trained. Call it once after each step.

        last: no later step could tell.
        """
        if self.over:
            return False
        if self.added.replaced() or self.others.replaced():
            self.start()
            return False
        if not self.added.known or self.added.counted():
            self.end()
            return False
        self.steps += 1
        self.gradients.seen()
        if self.steps in (FEW, MANY) or last:
            self._look(last)
        return self.found

    def end(self) -> None:
        """Nothing is watched any more."""
        self.over = True
        self.gradients.stop()

    def _look(self, last: bool) -> None:
        if self.added.moved():
            self.end()
            return
        late = last or self.steps >= MANY
        unused = self.gradients.seen() and (late or not self.others.known) and self._finite()
        self.found = self.others.moved() or unused
        if late and not self.found:
            self.end()

    def _finite(self) -> bool:
        """False where a gradient scaler will have skipped the step."""
        grads = [p.grad for p in (*self.added.now(), *self.others.now()) if p.grad is not None]
        return self.gradients.finite() and all(bool(local(grad).isfinite().all()) for grad in grads)


@torch.no_grad()
def _sums(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Numbers that change with the values of a parameter, `[2]` on its device, in the widest float there is."""
    sums = []
    for p in parameters:
        wide = torch.float64 if p.device.type in ("cpu", "cuda") else torch.float32
        flat = local(p).flatten()
        sums.append(torch.stack([flat.sum(dtype=wide), flat.abs().sum(dtype=wide)]))
    return sums
