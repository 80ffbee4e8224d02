"""Finds the channel groups of a model from example inputs, and proves each by a trial cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs
from gs_algos.core.modules import get_module, parent_name
from gs_algos.pruning.channel_groups.groups import FIXED, Attribute, Group, GroupLayer, Groups, Slice
from gs_algos.pruning.channel_groups.in_place import freeze_partial_writes
from gs_algos.pruning.channel_groups.labels import Axis, components
from gs_algos.pruning.channel_groups.op_rules import rule_of
from gs_algos.pruning.channel_groups.trace import ChannelFlow, ReshapedChannels, trace_flow
from gs_algos.pruning.channel_groups.trial_cut import failures

# what modules call the number of their heads, and widths that are a multiple of it
COUNTS = ("heads", "num_heads", "n_heads", "n_head", "nhead", "num_attention_heads", "num_key_value_heads", "nb_heads")
WIDTHS = ("all_head_size", "attn_dim", "attention_dim", "inner_dim", "split_size", "hidden_features")


def find_groups(model: nn.Module, example_inputs: Inputs, prove: bool = True) -> Groups:
    """Finds the channel groups of a model, which is as it was afterwards.

    Args:
        model: any module; it is run as it is, so whatever runs can be read.
        example_inputs: a tensor, a tuple of positional inputs or a mapping of keyword inputs, batch first.
        prove: cut one unit of every group for a trial, and refuse the groups whose cut network fails to run or differs
            from the one with zeros in its place.

    Raises:
        ValueError: if the inputs do not run through the model.
    """
    flow = ChannelFlow(model)
    trace_flow(flow, example_inputs, False, rule_of, freeze_partial_writes)
    notes = _trace_training_if_needed(flow, example_inputs)
    groups = resolve(flow, notes)
    while prove and (bad := failures(model, groups, example_inputs)):
        groups = _with_refused(groups, bad)
    return groups


def _trace_training_if_needed(flow: ChannelFlow, example_inputs: Inputs) -> tuple[str, ...]:
    """Traces a training pass too if some parameters did not run in eval mode; returns a note if some run in neither."""
    if all(id(p) in flow.ran for p in flow.model.parameters()):
        return ()
    notes: tuple[str, ...] = ()
    try:
        trace_flow(flow, example_inputs, True, rule_of, freeze_partial_writes)
    except ValueError as error:
        notes = (f"a training pass could not be read: {error}",)
    idle = [name for name, p in flow.model.named_parameters() if id(p) not in flow.ran]
    if idle:
        some = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
        notes += (f"{some} did not run on the example inputs and keep their shapes",)
    return notes


def resolve(flow: ChannelFlow, notes: tuple[str, ...] = ()) -> Groups:
    """Returns the groups that a flow shows, before any trial."""
    classes = _settled_classes(flow)
    axes = sorted(flow.atoms.axes.values(), key=lambda axis: axis.start)
    starts = torch.tensor([axis.start for axis in axes] or [0])
    reasons = _reasons(flow, classes, axes)
    makers = _makers(flow, axes, starts)
    members = _members(classes, makers, flow.atoms.n)
    unit_of = torch.full((max(flow.atoms.n, 1),), FIXED)  # class -> unit
    n, groups = 0, []
    norms = _norms(flow, axes, starts)
    heads = _heads(flow, classes)
    for layers in members:
        own = torch.cat([classes[axis.atoms()] for axis in layers]).unique()
        free = own[[c not in reasons for c in own.tolist()]]
        why = list(dict.fromkeys(reasons[c] for c in own.tolist() if c in reasons))
        if len(free) < 2:
            free = free[:0]
            why = why or ["consists of one unit, which cannot go"]
        unit_of[free] = torch.arange(n, n + len(free))
        made = [(axis, norms.get(axis.start)) for axis in layers]
        attends = len(free) > 0 and bool(torch.isin(free, heads).all())
        groups.append(_GroupDraft(made, n, len(free), "; ".join(why[:2]) if not len(free) else "", attends))
        n += len(free)
    units = unit_of[classes] if flow.atoms.n else unit_of
    slices = [Slice(axis.tensor, axis.dim, units[axis.atoms()]) for axis in axes]
    slices = [part for part in slices if bool((part.units != FIXED).any())]
    costs = tuple((cost.macs, tuple(_units(units, f) for f in cost.factors)) for cost in flow.costs)
    attributes = tuple(_attributes(flow, classes, units))
    return Groups(tuple(g.group(units, slices) for g in groups), tuple(slices), attributes, costs, notes)


class _GroupDraft:
    """Holds a group whose layers' units are not numbered yet."""

    def __init__(self, made: list[tuple[Axis, str | None]], first: int, n: int, reason: str, attends: bool) -> None:
        self.made, self.first, self.n, self.reason, self.attends = made, first, n, reason, attends

    def group(self, units: Tensor, slices: list[Slice]) -> Group:
        layers = tuple(
            GroupLayer(parent_name(axis.tensor), axis.tensor, axis.dim, units[axis.atoms()], norm)
            for axis, norm in self.made
        )
        makers = {(layer.tensor, layer.dim) for layer in layers}
        last = self.first + self.n
        touched = [
            parent_name(part.tensor)
            for part in slices
            if (part.tensor, part.dim) not in makers and bool(((part.units >= self.first) & (part.units < last)).any())
        ]
        own = {layer.name for layer in layers} | {layer.norm for layer in layers}
        readers = tuple(dict.fromkeys(name for name in touched if name not in own))
        channels = sum(len(layer.units) for layer in layers)
        group = Group(layers, readers, self.first, self.n, channels, self.reason)
        return replace(group, heads=self.attends and max(group.widths) > 1)


def _settled_classes(flow: ChannelFlow) -> Tensor:
    """Returns the classes, with one dimension left in every reshaped tensor along which its channels can go."""
    while True:
        classes = flow.atoms.classes()
        before = len(flow.atoms.edges)
        for box in flow.boxes:
            dims = _varying_dims(box, classes)
            if len(dims) > 1:
                spare = [d for d in dims if d != _shrinking_dim(flow, box, dims)]
                flow.atoms.whole(box.labels, spare, f"is reshaped in {box.scope or 'the root'}")
        if len(flow.atoms.edges) == before:
            return classes


def _varying_dims(box: ReshapedChannels, classes: Tensor) -> list[int]:
    """Returns the dimensions along which the classes of a box vary."""
    box_classes = torch.where(box.labels < 0, box.labels, classes[box.labels.clamp(min=0)])
    return [d for d in range(box_classes.dim()) if not bool((box_classes == box_classes.narrow(d, 0, 1)).all())]


def _shrinking_dim(flow: ChannelFlow, box: ReshapedChannels, dims: list[int]) -> int:
    """Returns the dimension of a box that may shrink: that of the heads if the module counts them, else the last."""
    module = get_module(flow.model, box.scope)
    counts = {getattr(module, name, None) for name in COUNTS}
    return next((d for d in dims if box.labels.size(d) in counts), dims[-1])


def _heads(flow: ChannelFlow, classes: Tensor) -> Tensor:
    """Returns the classes over each of which attention runs by itself."""
    labels = torch.cat(flow.heads) if flow.heads else torch.zeros(0, dtype=torch.int64)
    return classes[labels[labels >= 0]].unique()


def _reasons(flow: ChannelFlow, classes: Tensor, axes: list[Axis]) -> dict[int, str]:
    """Returns class -> why it cannot go."""
    reasons: dict[int, str] = {}
    for labels, why in flow.atoms.frozen:
        for c in classes[labels].unique().tolist():
            reasons.setdefault(c, why)
    for axis in axes:
        own = classes[axis.atoms()].unique()
        if len(own) == 1 and axis.size > 1:
            reasons.setdefault(int(own), f"would take all of {axis.tensor} along dimension {axis.dim}")
    return reasons


def _makers(flow: ChannelFlow, axes: list[Axis], starts: Tensor) -> list[Axis]:
    """Returns the axes that are output channels of a layer, in the order of the model's parameters."""
    if not flow.produced:
        return []
    labels = torch.cat(flow.produced)
    indices = _axis_of(starts, labels[labels >= 0]).unique().tolist()
    order = {name: i for i, name in enumerate(n for n, _ in flow.model.named_parameters())}
    return sorted((axes[i] for i in indices), key=lambda axis: order.get(axis.tensor, len(order)))


def _members(classes: Tensor, makers: list[Axis], n: int) -> list[list[Axis]]:
    """Collects the layers of each group: those that share a class."""
    edges = [(classes[axis.atoms()], torch.full((axis.size,), n + i)) for i, axis in enumerate(makers)]
    root = components(n + len(makers), edges)
    members: dict[int, list[Axis]] = {}
    for i, axis in enumerate(makers):
        members.setdefault(int(root[n + i]), []).append(axis)
    return list(members.values())


def _norms(flow: ChannelFlow, axes: list[Axis], starts: Tensor) -> dict[int, str]:
    """Returns start of a layer's axis -> the batch norm that reads exactly its channels."""
    norms: dict[int, str] = {}
    for labels, own in flow.norms:
        if bool((labels == labels[0] + torch.arange(len(labels))).all()) and bool((own >= 0).all()):
            norms[int(labels[0])] = parent_name(axes[int(_axis_of(starts, own[:1]))].tensor)
    return norms


def _attributes(flow: ChannelFlow, classes: Tensor, units: Tensor) -> Iterable[Attribute]:
    """Yields the integers of modules that reshaped their channels into heads."""
    seen: set[tuple[str, str]] = set()
    for box in flow.boxes:
        dims = _varying_dims(box, classes)
        if len(dims) != 1:
            continue
        line = box.labels.movedim(dims[0], 0).flatten(1)[:, 0]
        heads = _units(units, line)
        module, n = get_module(flow.model, box.scope), len(line)
        for name in (*COUNTS, *WIDTHS):
            value = module.__dict__.get(name)
            fits = value == n if name in COUNTS else isinstance(value, int) and value % n == 0
            if type(value) is int and fits and bool((heads != FIXED).any()) and (box.scope, name) not in seen:
                seen.add((box.scope, name))
                yield Attribute(box.scope, name, value // n, heads)


def _axis_of(starts: Tensor, labels: Tensor) -> Tensor:
    return torch.searchsorted(starts, labels, right=True) - 1


def _units(units: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels < 0, FIXED, units[labels.clamp(min=0)])


def _with_refused(groups: Groups, bad: dict[int, str]) -> Groups:
    """Returns the groups with those at these indices refused, units renumbered."""
    number, n, kept = torch.full((groups.n,), FIXED), 0, []
    for i, group in enumerate(groups.groups):
        size = 0 if i in bad else group.n
        number[group.first : group.first + size] = torch.arange(n, n + size)
        kept.append(replace(group, first=n, n=size, reason=bad.get(i, group.reason)))
        n += size

    def renumbered(units: Tensor) -> Tensor:
        return torch.where(units == FIXED, FIXED, number[units.clamp(min=0)])

    kept = [replace(g, layers=tuple(replace(x, units=renumbered(x.units)) for x in g.layers)) for g in kept]
    slices = [replace(part, units=renumbered(part.units)) for part in groups.slices]
    attributes = [replace(item, units=renumbered(item.units)) for item in groups.attributes]
    return Groups(
        tuple(kept),
        tuple(part for part in slices if bool((part.units != FIXED).any())),
        tuple(item for item in attributes if bool((item.units != FIXED).any())),
        tuple((macs, tuple(renumbered(f) for f in factors)) for macs, factors in groups.costs),
        groups.notes,
    )
