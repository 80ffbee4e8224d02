"""Groups of coupled channels: which channels of which tensors go together, as data that prints, saves and cuts.

A unit is the smallest thing that can go: one channel of a conv with its batch norm, its skip connections and what reads
it; one attention head with its query, key, value and output; one neuron of an MLP. A group is the units of the same
layers. Units are numbered through all groups; a slice says for one dimension of one tensor which unit each index is of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.plan import render_layers

FIXED = -1  # unit of an index that always stays
LONGEST = 2**26  # of a vector of units that is read from a file
RUN = re.compile(r"(?P<first>-|\d+)(?:\.\.(?P<last>\d+))?(?:\*(?P<times>\d+))?")


@dataclass(frozen=True)
class Slice:
    """Names a dimension of a tensor that loses indices. units: `[size]`, the unit of each index or FIXED."""

    tensor: str
    dim: int
    units: Tensor


@dataclass(frozen=True)
class GroupLayer:
    """Names a layer that makes channels of a group. norm: the batch norm behind it, if it normalizes just these."""

    name: str
    tensor: str
    dim: int
    units: Tensor
    norm: str | None = None


@dataclass(frozen=True)
class Attribute:
    """Names an integer that a module keeps of its own size: `per` times how many of these units stay."""

    module: str
    name: str
    per: int
    units: Tensor


@dataclass(frozen=True)
class Group:
    """Holds units `first .. first + n - 1`, made by `layers`, read by `readers`.

    reason: why none can go (n = 0); heads: attention runs over each unit by itself.
    """

    layers: tuple[GroupLayer, ...]
    readers: tuple[str, ...]
    first: int
    n: int
    channels: int  # output channels of the layers, in all
    reason: str = ""
    heads: bool = False

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def widths(self) -> tuple[int, ...]:
        """Counts, layer by layer, how many channels one unit takes."""
        return tuple(max(1, int((layer.units == self.first).sum())) for layer in self.layers)


@dataclass(frozen=True)
class Groups:
    """Holds every group of a model, and what has to be cut if units go.

    costs: (multiply-adds on the example inputs, per factor the unit of each of its channels).
    """

    groups: tuple[Group, ...]
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...]
    costs: tuple[tuple[int, tuple[Tensor, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return sum(group.n for group in self.groups)

    def prunable(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.n)

    def everything(self) -> Tensor:
        """Returns the `keep` with which all units stay, bool `[n]`."""
        return torch.ones(self.n, dtype=torch.bool)

    def macs(self, keep: Tensor) -> int:
        """Counts the multiply-adds on the example inputs if the units in `keep` stay."""
        return round(sum(macs * math.prod(_share(keep, f) for f in factors) for macs, factors in self.costs))

    def numel(self, shapes: Mapping[str, Sequence[int]], keep: Tensor) -> int:
        """Counts the elements of tensors of these shapes if the units in `keep` stay."""
        return sum(math.prod(shape) for shape in self.shapes(shapes, keep).values())

    def shapes(self, shapes: Mapping[str, Sequence[int]], keep: Tensor) -> dict[str, list[int]]:
        """Returns the shapes that a cut leaves of these."""
        left = {name: list(shape) for name, shape in shapes.items()}
        for part in self.slices:
            if part.tensor in left:
                left[part.tensor][part.dim] = int(stays(keep, part.units).sum())
        return left

    def __str__(self) -> str:
        rows = [(g.name, g.n or "-", _layers(g), _some(g.readers, 4), g.reason) for g in self.groups]
        head = f"{len(self.prunable())} of {len(self.groups)} groups can lose channels"
        table = render_layers(("group", "units", "made by", "read by", "stays whole because it"), rows)
        return "\n".join([head, table, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            "groups": [
                {
                    "layers": [[x.name, x.tensor, x.dim, encode(x.units), x.norm] for x in g.layers],
                    "readers": list(g.readers),
                    "first": g.first,
                    "n": g.n,
                    "channels": g.channels,
                    "reason": g.reason,
                    "heads": g.heads,
                }
                for g in self.groups
            ],
            "slices": [[x.tensor, x.dim, encode(x.units)] for x in self.slices],
            "attributes": [[x.module, x.name, x.per, encode(x.units)] for x in self.attributes],
            "costs": [[macs, [encode(f) for f in factors]] for macs, factors in self.costs],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Groups:
        groups = tuple(
            Group(
                tuple(
                    GroupLayer(name, tensor, dim, decode(code), norm) for name, tensor, dim, code, norm in g["layers"]
                ),
                tuple(g["readers"]),
                g["first"],
                g["n"],
                g["channels"],
                g["reason"],
                g.get("heads", False),  # earlier checkpoints do not have it
            )
            for g in data["groups"]
        )
        return cls(
            groups,
            tuple(Slice(tensor, dim, decode(code)) for tensor, dim, code in data["slices"]),
            tuple(Attribute(module, name, per, decode(code)) for module, name, per, code in data["attributes"]),
            tuple((macs, tuple(decode(f) for f in factors)) for macs, factors in data["costs"]),
        )


def refuse_foreign_groups(groups: Groups, model: nn.Module) -> None:
    """Raises unless groups that were read from a file are of this model.

    Raises:
        ValueError: if a number is none, or a tensor, a dimension or a unit is not there.
    """
    first = 0
    for group in groups.groups:
        numbers = (group.first, group.n, group.channels)
        if not all(type(n) is int and n >= 0 for n in numbers) or (group.n and group.first != first):
            raise ValueError(f"Groups: units of a group must follow those of the one before, got {numbers}")
        if not all(isinstance(reader, str) for reader in group.readers):
            raise ValueError(f"Groups: readers must be names of layers, got {group.readers}")
        first += group.n
    named = tensors_by_name(model)
    parts: list[Slice | GroupLayer] = [*groups.slices, *(layer for group in groups.groups for layer in group.layers)]
    for part in parts:
        tensor = named.get(part.tensor) if isinstance(part.tensor, str) else None
        there = tensor is not None and type(part.dim) is int and 0 <= part.dim < tensor.dim()
        if not there:
            raise ValueError(f"Groups: a slice must be of a tensor of the model, got {part.tensor!r}, {part.dim!r}")
    for cut in groups.slices:
        if tuple(cut.units.shape) != (named[cut.tensor].shape[cut.dim],) or int(cut.units.max()) >= groups.n:
            raise ValueError(f"Groups: {cut.tensor} must have a known unit for each index of dimension {cut.dim}")


def stays(keep: Tensor, units: Tensor) -> Tensor:
    """Returns bool `[size]`: which indices stay if the units in `keep` stay."""
    return torch.where(units == FIXED, True, keep[units.clamp(min=0)]) if keep.numel() else units == FIXED


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by first qualified name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def encode(units: Tensor) -> str:
    """Writes a vector of units as runs: `4..7` counts up, `4*49` repeats, `4..7*49` repeats each; `-` is FIXED."""
    runs: list[str] = []
    values, counts = torch.unique_consecutive(units, return_counts=True)
    i = 0
    while i < len(values):
        j, times = i + 1, int(counts[i])
        start = int(values[i])
        if start != FIXED:
            while j < len(values) and int(values[j]) == start + j - i and int(counts[j]) == times:
                j += 1
        text = "-" if start == FIXED else str(start) if j == i + 1 else f"{start}..{start + j - i - 1}"
        runs.append(text if times == 1 else f"{text}*{times}")
        i = j
    return " ".join(runs)


def decode(code: str) -> Tensor:
    """Reads the vector that `encode` wrote.

    Raises:
        ValueError: if the text is no such code, or stands for more than LONGEST units.
    """
    parts: list[Tensor] = []
    left = LONGEST
    for run in code.split():
        match = RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"groups: units must be runs such as 0..3*2 or -, got {run!r}")
        first = FIXED if match["first"] == "-" else int(match["first"])
        last, times = int(match["last"] or first), int(match["times"] or 1)
        left -= (last - first + 1) * times
        if last < first or left < 0:
            raise ValueError(f"groups: units must be at most {LONGEST:,} and count up, got {run!r}")
        parts.append(torch.arange(first, last + 1).repeat_interleave(times))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _share(keep: Tensor, factor: Tensor) -> float:
    return float(stays(keep, factor).double().mean()) if factor.numel() else 1.0


def _layers(group: Group) -> str:
    widths = group.widths if group.n else (1,) * len(group.layers)
    pairs = zip(group.layers, widths, strict=True)
    return _some([layer.name + (f" x{width}" if width > 1 else "") for layer, width in pairs], 6)


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
