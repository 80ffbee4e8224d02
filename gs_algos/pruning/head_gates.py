"""Gates on attention heads: a factor in front of the layer that reads them, the output projection.

Its columns are multiplied, so one place gates a head in every kind of attention, also query heads that share their keys
and values, which have one gate together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.tensor_rules import FINITE, Rules
from gs_algos.pruning.channel_gates import GatedLayer, add_gate
from gs_algos.pruning.channel_groups.groups import FIXED, Group, Groups
from gs_algos.pruning.counted_attention import CountedAttention
from gs_kernels.runtime.torch_private import _ConvNd

TEMPERATURE = 0.33  # of the hard concrete distribution
LOW, HIGH = -0.1, 1.1  # what its sigmoid is stretched to before it is clipped to [0, 1]
OPEN = 3.0  # a at the start: sigmoid(3) stretches to more than 1, so nothing changes yet
EPSILON = 1e-6  # u stays this far from 0 and 1


def sampled(a: Tensor) -> Tensor:
    """Draws hard concrete gates: `clip(1.2 s - .1, 0, 1)`, `s = sigmoid((log u - log(1 - u) + a) / .33)`."""
    u = torch.rand_like(a).clamp(EPSILON, 1 - EPSILON)
    return stretched(torch.sigmoid((u.log() - torch.log1p(-u) + a) / TEMPERATURE))


def expected(a: Tensor) -> Tensor:
    """Returns the gates without noise: `clip(1.2 sigmoid(a) - .1, 0, 1)`, exactly 0 or 1 from |a| > 2.4 on."""
    return stretched(torch.sigmoid(a))


def stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def chance_open(a: Tensor) -> Tensor:
    """Returns the probability that a gate is not 0: `sigmoid(a - .33 log(.1 / 1.1))`. Its sum is the expected count."""
    return torch.sigmoid(a - TEMPERATURE * math.log(-LOW / HIGH))


class HeadGate(GatedLayer):
    """Multiplies what a layer reads by the gate of the head that it comes from; mixed in front of the layer's class.

    gate: `[heads]`, a of a hard concrete gate if `hard`, else the factor itself.
    gate_price: `[1]`, the multiplier that drives the count of open gates.
    gate_heads: `[columns]`, the head of each column, or `heads` for one that belongs to none.
    """

    prefix = "HeadGated"
    gate_price: Tensor
    gate_heads: Tensor
    hard: bool

    def factors(self) -> Tensor:
        """Returns the gate of each column, `[columns]`."""
        gate = self.gate
        if self.hard:
            gate = sampled(gate) if self.training else expected(gate)
        return torch.cat([gate, gate.new_ones(1)])[self.gate_heads]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.gate_on:
            return super(GatedLayer, self).forward(*args, **kwargs)  # type: ignore[misc, no-any-return]
        x, *rest = args
        factors = self.factors().to(x.dtype)
        x = x * (factors.view(-1, *[1] * (x.dim() - 2)) if isinstance(self, _ConvNd) else factors)
        return super(GatedLayer, self).forward(x, *rest, **kwargs)  # type: ignore[misc, no-any-return]

    def remove_gate(self) -> None:
        for key in ("gate_price", "gate_heads"):
            del self._buffers[key]
        self._non_persistent_buffers_set.discard("gate_heads")
        del self.hard
        super().remove_gate()

    def state_rules(self) -> Rules:
        return {**super().state_rules(), "gate_price": FINITE}


class AttentionGate(CountedAttention, HeadGate):
    """Does it inside an `nn.MultiheadAttention`, which reads the weight of its output projection without calling it."""

    def head_columns(self) -> Tensor | None:
        return self.factors() if self.gate_on else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return CountedAttention.forward(self, *args, **kwargs)


def put_head_gate(module: Any, heads_of: Tensor, heads: int, hard: bool) -> None:
    """Gives a live layer gates of its heads. heads_of: `[columns]`, the head of each, FIXED for none."""
    kind = AttentionGate if isinstance(module, nn.MultiheadAttention) else HeadGate
    add_gate(module, kind, heads, OPEN if hard else 1.0)
    device = module.gate.device
    module.register_buffer("gate_price", torch.zeros(1, device=device))
    columns = torch.where(heads_of == FIXED, heads, heads_of).to(device)
    module.register_buffer("gate_heads", columns, persistent=False)
    module.hard = hard


@torch.no_grad()
def fold_gates(module: Any) -> None:
    """Multiplies the columns of the output projection by the gates without noise, which are 1 from then on."""
    factors = torch.cat([expected(module.gate), module.gate.new_ones(1)])[module.gate_heads]
    weight = projection_weight(module)
    weight.data.mul_(factors.to(weight.dtype).view([-1 if d == _in_dim(module) else 1 for d in range(weight.dim())]))


def projection_weight(module: Any) -> Tensor:
    """Returns the weight whose columns read the heads."""
    return module.out_proj.weight if isinstance(module, nn.MultiheadAttention) else module.weight  # type: ignore[no-any-return]


def _in_dim(module: nn.Module) -> int:
    return 0 if {"nx", "nf"} <= module.__dict__.keys() else 1  # the Conv1D of GPT-2 has inputs first


def _can_gate_inputs(module: nn.Module) -> bool:
    whole_conv = isinstance(module, _ConvNd) and module.groups == 1
    return whole_conv or _in_dim(module) == 0 or isinstance(module, nn.Linear | nn.MultiheadAttention)


def gate_place(model: nn.Module, groups: Groups, group: Group) -> tuple[str, Tensor]:
    """Returns the layer that gets the gates of a group of heads, and the head of each of its columns, `[columns]`.

    Raises:
        ValueError: if no single layer reads the heads whose inputs can be gated; says which do.
    """
    found: dict[str, Tensor] = {}
    named = dict(model.named_modules())
    for reader in group.readers:
        owner, _, last = reader.rpartition(".")
        inside_attention = last == "out_proj" and isinstance(named.get(owner), nn.MultiheadAttention)
        site = owner if inside_attention else reader
        module = named.get(site)
        if module is None or not _can_gate_inputs(module):
            raise ValueError(f"are read by {reader} ({type(module).__name__}), whose inputs cannot be gated")
        weight = f"{reader}.weight"
        for part in groups.slices:
            inside = (part.units >= group.first) & (part.units < group.first + group.n)
            if part.tensor == weight and part.dim == _in_dim(module) and bool(inside.any()):
                found[site] = torch.where(inside, part.units - group.first, FIXED)
    if len(found) != 1:
        raise ValueError(f"are read by {', '.join(found) or 'no layer'}, not by one layer whose inputs can be gated")
    return next(iter(found.items()))
