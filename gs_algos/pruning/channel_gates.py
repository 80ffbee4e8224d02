"""Gates: one trainable number for each output channel of a live layer, while the rest of the network stands still.

The class of a layer is swapped, as in gs_algos/quant/fake_quant/layers.py. It gains three fp32 buffers: `gate [O]`, a
leaf that collects a gradient, and `gate_mean`, `gate_square` for the moments of that gradient. Buffers, not
parameters, so that the user's optimizer does not see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import remove_hooks, swapped_class
from gs_algos.core.tensor_rules import FINITE, NOT_NEGATIVE, Rules
from gs_kernels.runtime.torch_private import _ConvNd, _NormBase

BUFFERS = ("gate", "gate_mean", "gate_square")
Batch = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of a forward


class GatedLayer(nn.Module):
    """Passes a layer's output through its gate in training; mixed in front of the layer's own class."""

    prefix = "Gated"
    gate: Tensor
    gate_mean: Tensor
    gate_square: Tensor
    gate_on: bool  # in training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        if not (self.gate_on and self.training):
            return y
        gate = self.gate.to(y.dtype)
        first = isinstance(self, (_ConvNd, _NormBase))  # channels are on axis 1, else on the last one
        return self.gated(y, gate.view(-1, *[1] * (y.dim() - 2)) if first else gate)

    def remove_gate(self) -> None:
        """Takes off what `add_gate` put on."""
        for key in BUFFERS:
            del self._buffers[key]
        del self.gate_on
        self.__class__ = type(self).__bases__[1]  # type: ignore[assignment]

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """Applies the gate to the output. gate: in the shape of y along the channels, 1 elsewhere."""
        raise AssertionError("every gate says what it does to an output")

    def state_rules(self) -> Rules:
        return {"gate": FINITE, "gate_mean": FINITE, "gate_square": NOT_NEGATIVE}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedLayer:
        super()._apply(fn, recurse)
        for key in BUFFERS:
            self._buffers[key] = self._buffers[key].detach().float()  # type: ignore[union-attr]
        self.gate.requires_grad_()
        return self


class KnockoffGate(GatedLayer):
    """Turns the first half of the batch into `gate * y + (1 - gate) * y~`, y~ its knock-offs in the second half."""

    prefix = "Blending"

    def remove_gate(self) -> None:
        """Takes off what `add_gate` put on."""
        for key in BUFFERS:
            del self._buffers[key]
        del self.gate_on
        self.__class__ = type(self).__bases__[1]  # type: ignore[assignment]

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        if y.size(0) % 2:
            raise ValueError(f"SCOP: a layer must see as many knock-offs as inputs, got {y.size(0)} rows in all")
        real, other = y.chunk(2)
        return torch.cat([torch.lerp(other, real, gate), other])


class ScaleGate(GatedLayer):
    """Multiplies by the gate: with a gate of 1 its gradient says what the loss would be without the channel."""

    prefix = "Scaled"

    def remove_gate(self) -> None:
        """Takes off what `add_gate` put on."""
        for key in BUFFERS:
            del self._buffers[key]
        del self.gate_on
        self.__class__ = type(self).__bases__[1]  # type: ignore[assignment]

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return y * gate


def can_gate(module: nn.Module) -> bool:
    """Returns whether the output channels of a module are known to be on axis 1 or on the last one."""
    layer = isinstance(module, (_ConvNd, _NormBase, nn.Linear, nn.Embedding))
    return layer or {"nx", "nf"} <= module.__dict__.keys()  # the Conv1D of GPT-2


def add_gate(module: Any, kind: type[GatedLayer], size: int, start: float) -> None:
    """Gives a live module a gate of `size` channels that starts at `start`, by a swap of its class."""
    device = next(module.parameters()).device
    for key, value in zip(BUFFERS, (start, 0.0, 0.0), strict=True):
        module.register_buffer(key, torch.full((size,), value, dtype=torch.float32, device=device))
    module.gate.requires_grad_()
    module.gate_on = False
    module.__class__ = swapped_class(kind, type(module))


class Freezer:
    """Keeps parameters and statistics still in a forward in training, while `on`, by hooks on the root of a model.

    Parameters need a gradient again once the forward is over, so an optimizer made at any time has them; it finds no
    gradient in them and passes them over. change_inputs, change_output: called before and after.
    """

    def __init__(
        self, change_inputs: Callable[[Batch], Batch] | None = None, change_output: Callable[[Any], Any] | None = None
    ):
        self.on = False
        self.change_inputs, self.change_output = change_inputs, change_output
        self.parameters: list[nn.Parameter] = []
        self.norms: list[_NormBase] = []
        self.running = False

    def attach(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Freezer:
        """Copies all but the source of knock-offs, which may be a data loader: the copy shares it."""
        new = memo[id(self)] = Freezer(self.change_inputs, self.change_output)
        new.on = self.on
        return new

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
        if not (self.on and module.training):
            return None
        self.running = True
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for norm in self.norms:
            norm.track_running_stats = False
        return (args, kwargs) if self.change_inputs is None else self.change_inputs((args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.running:
            return None
        self.running = False
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for norm in self.norms:
            norm.track_running_stats = True
        self.parameters, self.norms = [], []
        return output if output is None or self.change_output is None else self.change_output(output)


def remove_freezers(model: nn.Module) -> None:
    """Takes the hooks of every Freezer off a model, also off a copy."""
    remove_hooks(model, lambda hook: isinstance(getattr(hook, "__self__", None), Freezer))
