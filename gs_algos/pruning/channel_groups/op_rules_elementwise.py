"""Follows channels through tensors that are combined element by element, which most other rules use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gs_algos.pruning.channel_groups.labels import Value, varying
from gs_algos.pruning.channel_groups.trace import ChannelFlow


def combine(flow: ChannelFlow, values: Sequence[Value], shape: Sequence[int], where: str) -> Value:
    """Combines labels element by element, with broadcasting: channels at the same place go together.

    Next to something of fixed size, or that varies along other dimensions, the shared dimensions stay whole.
    """
    rank, reason = len(shape), f"is combined with something of fixed size in {where}"
    aligned = [
        Value(
            (1,) * (rank - len(v.shape)) + v.shape,
            tuple(f.view((1,) * (rank - f.dim()) + tuple(f.shape)) for f in v.fields),
        )
        for v in values
    ]
    fields: list[Tensor] = []
    for i, value in enumerate(aligned):
        for labels in value.fields:
            rest: Tensor | None = labels
            for j, other in enumerate(aligned):
                if i != j and rest is not None:
                    rest = _beside(flow, rest, other, reason)
            fields += [] if rest is None else [rest]
    weights = any(v.weights for v in values) and all(v.weights or not v.fields for v in values)
    return Value(tuple(shape), flow.atoms.settle(fields, reason), weights)


def _beside(flow: ChannelFlow, labels: Tensor, other: Value, reason: str) -> Tensor | None:
    """Returns the labels that can go beside another operand; `settle` ties those that overlap a field of it."""
    shared = {d for d in varying(labels) if other.shape[d] > 1}
    labelled = {d for field in other.fields for d in varying(field)}
    return flow.atoms.whole(labels, shared - labelled, reason)
