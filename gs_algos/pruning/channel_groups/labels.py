"""Labels that travel through a forward pass and tell which channels of which tensors must be removed together.

Every index of every dimension of every parameter has a number, its atom. A tensor of the forward pass carries fields:
for each position along its channel dimension, the atom that made it. Atoms that can only be removed together are
united; what is left at the end are classes of atoms, the units that pruning may take away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

NOTHING = -1  # label of a position that no layer makes: padding


@dataclass(frozen=True)
class Axis:
    """Names one dimension of one parameter or buffer. Its atoms are `start .. start + size - 1`."""

    tensor: str  # qualified name
    dim: int
    start: int
    size: int

    def atoms(self) -> Tensor:
        return torch.arange(self.start, self.start + self.size)


@dataclass(frozen=True)
class Value:
    """Holds the labels of one tensor of the forward pass.

    fields: int64 labels with the rank of the tensor; a dimension of size 1 says that the labels do not vary along it.
    weights: True for parameters and for views of them.
    """

    shape: tuple[int, ...]
    fields: tuple[Tensor, ...] = ()
    weights: bool = False


@dataclass
class Atoms:
    """Collects the atoms of one model: which are united, and which cannot be removed."""

    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    n: int = 0
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)  # (atoms, why none of them can be removed)

    def axis(self, tensor: str, dim: int, size: int) -> Axis:
        """Returns the axis of a dimension, made at its first use."""
        key = (tensor, dim)
        if key not in self.axes:
            self.axes[key] = Axis(tensor, dim, self.n, size)
            self.n += size
        return self.axes[key]

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Unites labels at the same position (after broadcasting): removed together, or not at all next to padding."""
        a, b = (t.flatten() for t in torch.broadcast_tensors(a, b))
        made = (a != NOTHING) & (b != NOTHING)
        self.edges.append((a[made], b[made]))
        alone = torch.maximum(a, b)[~made]
        self.freeze(alone, reason)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Notes that none of these labels can be removed."""
        labels = labels.flatten()
        labels = labels[labels != NOTHING].unique()
        if labels.numel():
            self.frozen.append((labels, reason))

    def whole(self, labels: Tensor, dims: Iterable[int], reason: str) -> Tensor | None:
        """Unites the positions along `dims`. Returns the labels without these dimensions; None if frozen.

        Labels that vary along no other dimension cannot be removed at all, since that would remove the whole tensor.
        """
        dims = [d for d in dims if labels.size(d) > 1]
        if not dims:
            return labels
        rest = labels
        for d in dims:
            rest = rest.narrow(d, 0, 1)
        if rest.numel() == 1:
            self.freeze(labels, reason)
            return None
        self.unite(labels, rest, reason)
        return rest

    def tie(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Ties two fields of one tensor, or of two combined element by element: what goes in one goes in the other.

        If one varies along more dimensions (heads and their width, against one of them), the trailing dimensions stay
        whole, so that heads go as heads.
        """
        va, vb = varying(a), varying(b)
        if va == vb:
            self.unite(a, b, reason)
            return
        if va < vb:
            a, b, va, vb = b, a, vb, va
        common = va & vb
        if vb < va and min(va - vb) > max(vb):
            rest = self.whole(a, va - vb, reason)
            assert rest is not None
            self.unite(rest, b, reason)
            return
        self.whole(a, common, reason)
        self.whole(b, common, reason)

    def settle(self, fields: Iterable[Tensor], reason: str) -> tuple[Tensor, ...]:
        """Returns the fields with no two along the same dimension: those that overlap are tied, the wider one stays."""
        settled: list[Tensor] = []
        for new in fields:
            for i, old in enumerate(settled):
                if varying(old) & varying(new):
                    self.tie(old, new, reason)
                    settled[i] = new if varying(old) < varying(new) else old
                    break
            else:
                if varying(new):
                    settled.append(new)
        return tuple(settled)

    def classes(self) -> Tensor:
        """Returns `[n]` int64: the smallest atom that each atom is united with."""
        return components(self.n, self.edges)


def varying(labels: Tensor) -> frozenset[int]:
    """Returns the dimensions along which a field varies."""
    return frozenset(d for d in range(labels.dim()) if labels.size(d) > 1)


def compact(labels: Tensor) -> Tensor:
    """Returns the labels with size 1 along every dimension along which they are constant."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    for d in range(labels.dim()):
        first = labels.narrow(d, 0, 1)
        if labels.size(d) > 1 and bool((labels == first).all()):
            labels = first
    return labels


def components(n: int, edges: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns `[n]` int64: the smallest number that each in 0..n-1 is connected to by edges (pairs of vectors)."""
    root = torch.arange(n)
    pairs = list(edges)
    if not pairs:
        return root
    a, b = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    while True:
        low = torch.minimum(root[a], root[b])
        new = root
        for at in (a, b, root[a], root[b]):
            new = new.scatter_reduce(0, at, low, "amin")
        new = new[new]
        if torch.equal(new, root):
            return root
        root = new
