"""Knock-offs: inputs that look like the data but do not belong to the labels of the batch they stand beside.

Tang et al. 2020, arXiv:2010.10732, section 3.1. Sources: the batch itself in another order, any iterable of inputs, and
a small generator trained to match the distribution of images (Li, Swersky and Zemel 2015, arXiv:1502.02761).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.batches import NumberedBatches
from gs_algos.core.progress import progress
from gs_algos.pruning.channel_gates import Batch
from gs_kernels.runtime.torch_private import tree_flatten, tree_map, tree_unflatten


class PermutedKnockoffs:
    """Rotates the batch by a number of rows that changes from step to step, so that no input meets itself."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, batch: Batch, rows: int) -> Batch:
        if rows < 2:
            raise ValueError(f"SCOP: a batch must have two inputs to permute, got {rows}; use drop_last=True")
        shift = 1 + self.turn % (rows - 1)
        return tree_map(lambda t: torch.roll(t, shift, 0) if _is_batched(t, rows) else t, batch)


class GivenKnockoffs:
    """Takes batches from an iterable, again from its start when it ends. A generator's depend on the step alone."""

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self.batches = batches
        self.iterator: Iterator[Inputs] = iter(())
        self.turn = 0

    def __call__(self, batch: Batch, rows: int) -> Batch:
        given = self._next()
        if given is None:
            raise ValueError("SCOP: knockoffs must give at least one batch, got none; an iterator is read only once")
        own, spec = tree_flatten(batch)
        theirs, their_spec = tree_flatten(split_inputs(given))
        if spec != their_spec:
            raise ValueError(f"SCOP: a knock-off batch must be made like the model's inputs, got {_shape(given)}")
        return tree_unflatten([_fitting(t, like, rows) for t, like in zip(theirs, own, strict=True)], spec)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the iterator out, which only this process has: another process begins with the first batch again."""
        once = isinstance(self.batches, Iterator)
        return {"batches": () if once else self.batches, "iterator": iter(()), "turn": self.turn}

    def _next(self) -> Inputs | None:
        if isinstance(self.batches, NumberedBatches):
            return self.batches.batch(self.turn)
        given = next(self.iterator, None)
        if given is None:
            self.iterator = iter(self.batches)
            given = next(self.iterator, None)
        return given


def _fitting(knockoff: Any, like: Any, rows: int) -> Any:
    """Returns the first rows of a knock-off tensor, on the device and in the type of the one it stands beside."""
    if not _is_batched(like, rows):
        return like
    fits = isinstance(knockoff, Tensor) and knockoff.shape[1:] == like.shape[1:] and len(knockoff) >= rows
    if not fits:
        raise ValueError(
            f"SCOP: a knock-off batch must have the shape of the batch it stands beside, {list(like.shape)}, "
            f"got {_shape(knockoff)}"
        )
    return knockoff[:rows].to(like)


def doubled(batch: Batch, source: Callable[[Batch, int], Batch]) -> Batch:
    """Puts the knock-offs behind the inputs, along axis 0 of every tensor that has the batch there."""
    leaves, spec = tree_flatten(batch)
    rows = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
    others = tree_flatten(source(batch, rows))[0]
    both = [torch.cat([a, b]) if _is_batched(a, rows) else a for a, b in zip(leaves, others, strict=True)]
    return tree_unflatten(both, spec)


class KnockoffDoubling:
    """Puts knock-offs behind the inputs of a forward. A network that is pickled takes it along.

    Args:
        kind: the option `knockoffs`, for messages.
    """

    def __init__(self, kind: str, source: GivenKnockoffs | PermutedKnockoffs | None) -> None:
        self.kind, self.source = kind, source
        self.turn = 0  # optimizer steps so far

    def __call__(self, batch: Batch) -> Batch:
        return doubled(batch, self._knockoffs)

    def _knockoffs(self, batch: Batch, rows: int) -> Batch:
        if self.source is None:
            how = "call fit_knockoffs(batches)" if self.kind == "generator" else "set algo.source"
            raise RuntimeError(f"SCOP: the first phase must have knock-offs, got none; {how} first")
        self.source.turn = self.turn
        return self.source(batch, rows)


def first_half(output: Any) -> Any:
    """Returns the outputs of the inputs alone: the first half of every tensor along axis 0."""
    tensors = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if any(t.dim() == 0 and t.is_floating_point() for t in tensors):
        raise ValueError("SCOP: the loss must be computed outside of the model, got an output that is one number")
    rows = {len(t) for t in tensors if t.dim()}
    if len(rows) != 1 or next(iter(rows)) % 2:
        raise ValueError(f"SCOP: every output must have the batch on axis 0, got sizes {sorted(rows)}")
    return tree_map(lambda t: t[: len(t) // 2] if isinstance(t, Tensor) and t.dim() else t, output)


class KnockoffGenerator(nn.Module):
    """Makes images `[B, C, H, W]` from noise; an endless iterable of batches once it is fitted.

    Trained so that the distribution of its images, and of their 2x2 means, matches the data's under kernels of several
    widths (maximum mean discrepancy): no second network, and nothing to balance.
    """

    def __init__(self, shape: tuple[int, int, int], noise: int = 32, width: int = 64, batch_size: int = 128) -> None:
        super().__init__()
        channels, height, wide = shape
        if min(height, wide) < 4:
            raise ValueError(f"KnockoffGenerator: images must have 4 pixels a side, got {height} x {wide}")
        self.shape, self.noise, self.batch_size = shape, noise, batch_size
        self.grid = (-(-height // 4), -(-wide // 4))
        self.start = nn.Linear(noise, width * self.grid[0] * self.grid[1])
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, channels, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """`[B, noise] -> [B, C, H, W]`."""
        y = self.body(self.start(z).view(len(z), -1, *self.grid))
        return y[..., : self.shape[1], : self.shape[2]]

    def fit(self, batches: Iterable[Tensor], steps: int = 500, lr: float = 2e-3, seed: int = 0) -> KnockoffGenerator:
        """Trains on batches of images, as often around as `steps` needs.

        Raises:
            ValueError: if there are no batches, or their images have another shape.
        """
        random = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr, betas=(0.5, 0.9))
        device = self.start.weight.device
        for x in progress(_around(batches, steps), "training the knock-off generator"):
            if tuple(x.shape[1:]) != self.shape:
                raise ValueError(f"KnockoffGenerator.fit: images must be {list(self.shape)}, got {list(x.shape[1:])}")
            z = torch.randn(len(x), self.noise, generator=random).to(device)
            y = self(z)
            loss = discrepancy(y.flatten(1), x.flatten(1))
            loss = loss + discrepancy(F.avg_pool2d(y, 2).flatten(1), F.avg_pool2d(x, 2).flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    def batch(self, number: int) -> Tensor:
        """Makes the images of this number, always the same, so that an interrupted training goes on with the next."""
        z = torch.randn(self.batch_size, self.noise, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            return self(z.to(self.start.weight.device))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batch, itertools.count())


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared maximum mean discrepancy of two samples, `[n, d]` and `[m, d]`.

    `mean k(a, a') + mean k(b, b') - 2 mean k(a, b)`, without pairs of a row with itself; k is a sum of
    Gaussians around the median distance.
    """
    aa, bb, ab = (torch.cdist(x, y).square() for x, y in ((a, a), (b, b), (a, b)))
    median = ab.detach().median().clamp(min=1e-12)
    total = torch.zeros((), device=a.device)
    for width in (0.25, 0.5, 1.0, 2.0):
        kernels = [torch.exp(-d / (width * median)) for d in (aa, bb, ab)]
        within = [(k.sum() - k.diagonal().sum()) / max(len(k) * (len(k) - 1), 1) for k in kernels[:2]]
        total = total + within[0] + within[1] - 2 * kernels[2].mean()
    return total


def _around(batches: Iterable[Tensor], steps: int) -> Iterator[Tensor]:
    done = 0
    while done < steps:
        before = done
        for x in batches:
            yield x
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError("KnockoffGenerator.fit: at least one batch of images must be given, got none")


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return str({key: _shape(item) for key, item in value.items()})
    return str([_shape(item) for item in value]) if isinstance(value, (tuple, list)) else type(value).__name__
