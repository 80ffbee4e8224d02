"""Fits ghosts by least squares: which channels the others follow from, and the depthwise filters that make them.

What is needed of a layer's outputs y are second moments: `E[y_c(t) y_j(t + k)]` for the k of the depthwise filter. They
follow from the filters alone if inputs are taken as white noise, or are measured on data. From one channel j another
one is predicted as `sum_k w_k y_j(t + k)` with the w that solve a system of `kernel^2` equations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.ghost.layers import GhostConv2d, primary_channels

RIDGE = 1e-4  # of the mean energy of a channel, added to that of predictors: dead ones predict nothing


@dataclass(frozen=True, eq=False)
class Moments:
    """Holds moments of a layer's outputs behind its batch norm, float64; T = kernel^2 shifts, row by row.

    Args:
        mean: `[C]` of each channel.
        shifted_mean: `[C, T]` of each channel, shifted, zeros beyond the border.
        energy: `[C]`, variances.
        own: `[C, T, T]`, covariances of a channel's shifts.
        cross: `[T, C, C]`, those of channel c with shift t of channel j, at `[t, c, j]`.
    """

    mean: Tensor
    shifted_mean: Tensor
    energy: Tensor
    own: Tensor
    cross: Tensor


@dataclass(frozen=True, eq=False)
class Fit:
    """Says how the channels of a layer are made.

    Args:
        primary: int64 `[m]`, the channels that are computed.
        ghosts: int64 `[m, ratio - 1]`, the channels that are made of each; -1: none.
        weight: `[C, T]`, the depthwise filter of each ghost; zeros of the others.
        source: int64 `[C]`, what each channel is made of; itself, if it is computed.
    """

    primary: Tensor
    ghosts: Tensor
    weight: Tensor
    source: Tensor

    @property
    def order(self) -> Tensor:
        """Returns the channel of the concat that each output is."""
        order = torch.empty(len(self.source), dtype=torch.int64)
        order[self.primary] = torch.arange(len(self.primary))
        flat = self.ghosts.flatten()
        order[flat[flat >= 0]] = torch.arange(len(flat))[flat >= 0] + len(self.primary)
        return order


def moments_of_filters(conv: nn.Conv2d, norm: Any, kernel: int) -> Moments:
    """Returns the moments for inputs of white noise; a batch norm says which mean and variance its outputs have."""
    w = conv.weight.detach().double().cpu()
    channels, (stride_h, stride_w) = len(w), conv.stride
    bias = torch.zeros(channels) if conv.bias is None else conv.bias.detach().double().cpu()
    mean = bias.double()
    if norm is not None:
        length = w.flatten(1).norm(dim=1).clamp(min=1e-30)
        w = w * (norm.weight.detach().double().cpu() / length).view(-1, 1, 1, 1)
        mean = norm.bias.detach().double().cpu()
    filters = w.new_zeros(*w.shape[:2], *(d * (n - 1) + 1 for d, n in zip(conv.dilation, w.shape[2:], strict=True)))
    filters[:, :, :: conv.dilation[0], :: conv.dilation[1]] = w
    rim = kernel // 2
    whole = F.pad(filters, (stride_w * rim,) * 2 + (stride_h * rim,) * 2)
    shifts = [(i, j) for i in range(-rim, rim + 1) for j in range(-rim, rim + 1)]
    moved = [torch.roll(whole, (i * stride_h, j * stride_w), (2, 3)).flatten(1) for i, j in shifts]
    flat = whole.flatten(1)
    own = torch.stack([torch.stack([(a * b).sum(1) for b in moved], 1) for a in moved], 1)
    cross = torch.stack([flat @ other.t() for other in moved])
    return Moments(mean, mean[:, None].expand(-1, len(shifts)), flat.square().sum(1), own, cross)


class OutputMoments:
    """Adds up the moments of outputs `[B, C, P, Q]`, batch by batch. kernel: side of the depthwise filters."""

    def __init__(self, channels: int, kernel: int) -> None:
        shifts = kernel * kernel
        self.kernel, self.count = kernel, 0
        self.sums = torch.zeros(shifts + 1, channels, dtype=torch.float64)  # the last: of the outputs themselves
        self.energy = torch.zeros(channels, dtype=torch.float64)
        self.own = torch.zeros(channels, shifts, shifts, dtype=torch.float64)
        self.cross = torch.zeros(shifts, channels, channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, y: Tensor) -> None:
        rim = self.kernel // 2
        rows, columns = y.shape[2:]
        wide = F.pad(y.float(), (rim,) * 4)
        places = itertools.product(range(self.kernel), range(self.kernel))
        moved = [wide[:, :, i : i + rows, j : j + columns].transpose(0, 1).flatten(1) for i, j in places]
        flat = moved[len(moved) // 2]
        self.count += flat.shape[1]
        for t, other in enumerate(moved):
            self.sums[t] += other.double().sum(1).cpu()
            self.cross[t] += (flat @ other.t()).double().cpu()
            for s in range(t + 1):
                total = (other * moved[s]).sum(1).double().cpu()
                self.own[:, t, s] += total
                if s < t:
                    self.own[:, s, t] += total
        self.sums[-1] += flat.double().sum(1).cpu()
        self.energy += flat.square().sum(1).double().cpu()

    def moments(self) -> Moments:
        mean, shifted = self.sums[-1] / self.count, self.sums[:-1].t() / self.count
        own = self.own / self.count - shifted[:, :, None] * shifted[:, None, :]
        cross = self.cross / self.count - mean[None, :, None] * shifted.t()[:, None, :]
        return Moments(mean, shifted, self.energy / self.count - mean.square(), own, cross)


class OutputWatch:
    """Adds up the moments of the outputs of layers while a network runs: three of four calls to fit to, one to measure.

    Args:
        modules: layer -> the module whose outputs count: its batch norm, or it.
        sizes: layer -> channels, and kernel of the depthwise filters.
        who: the caller, for messages.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, int]], who: str) -> None:
        self.who = who
        self.seen = {site: (OutputMoments(*sizes[site]), OutputMoments(*sizes[site])) for site in modules}
        self.calls = dict.fromkeys(modules, 0)
        self._handles = [module.register_forward_hook(self._hook(site)) for site, module in modules.items()]

    def _hook(self, site: str) -> Any:
        def after(layer: nn.Module, args: Any, y: Tensor) -> None:
            if not bool(y.isfinite().all()):
                raise ValueError(f"{self.who}: what {site} gives must be finite, got NaN or Inf")
            self.seen[site][self.calls[site] % 4 == 3].add(y)
            self.calls[site] += 1

        return after

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def moments(self) -> dict[str, tuple[Moments, Moments]]:
        """Returns layer -> moments to fit to, and to measure on; the same ones, where there were too few calls.

        Raises:
            ValueError: if a layer did not run.
        """
        if not all(self.calls.values()):
            raise ValueError(f"{self.who}: at least one batch must run through the model, got none")
        return {s: (one.moments(), (two if two.count else one).moments()) for s, (one, two) in self.seen.items()}


def fitted(moments: Moments, ratio: int) -> Fit:
    """Chooses the channels that predict the others best, greedily, and solves for the filters that do it."""
    channels, shifts = moments.shifted_mean.shape
    eye = torch.eye(shifts, dtype=torch.float64) * RIDGE * moments.energy.mean().clamp(min=1e-30)
    right = moments.cross.permute(2, 0, 1)  # [j, t, c]
    filters = torch.linalg.solve(moments.own + eye, right)  # [j, t, c]
    errors = (moments.energy - (filters * right).sum(1)).clamp(min=0).t()  # [c, j]
    errors.fill_diagonal_(0)
    primary = _chosen(errors, moments.energy, primary_channels(channels, ratio))
    others = torch.tensor([c for c in range(channels) if c not in set(primary.tolist())], dtype=torch.int64)
    slots = _assigned(errors[others][:, primary], ratio - 1)  # [ghosts]
    ghosts = torch.full((len(primary), ratio - 1), -1, dtype=torch.int64)
    source, weight = torch.arange(channels), torch.zeros(channels, shifts, dtype=torch.float64)
    for c, slot in zip(others.tolist(), slots.tolist(), strict=True):
        place = slot // (ratio - 1)
        ghosts[place, slot % (ratio - 1)] = c
        source[c] = primary[place]
        weight[c] = filters[source[c], :, c]
    return Fit(primary, ghosts, weight, source)


def error_of(fit: Fit, moments: Moments) -> float:
    """Returns the share of the outputs' variance that a fit leaves out, on these moments."""
    every = torch.arange(len(fit.source))
    ghost = fit.source != every
    own = torch.einsum("ct,cts,cs->c", fit.weight, moments.own[fit.source], fit.weight)
    crossed = (fit.weight * moments.cross[:, every, fit.source].t()).sum(1)
    left = (moments.energy - 2 * crossed + own)[ghost].clamp(min=0).sum()
    return float(left / moments.energy.sum().clamp(min=1e-30))


def _chosen(errors: Tensor, energy: Tensor, count: int) -> Tensor:
    """Returns so many channels, each the one with which the others are predicted best, in order."""
    left, chosen = energy.clone(), list[int]()
    for _ in range(count):
        gains = (left[:, None] - errors).clamp(min=0).sum(0)
        gains[chosen] = -1
        best = int(gains.argmax())
        chosen.append(best)
        left = torch.minimum(left, errors[:, best])
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _assigned(errors: Tensor, each: int) -> Tensor:
    """Returns the slot of each ghost, `each` slots a channel: best pairs first, then swaps as long as they help."""
    costs = errors.repeat_interleave(each, 1)  # [ghosts, slots]
    ghosts, slots = costs.shape
    taken = torch.full((ghosts,), -1, dtype=torch.int64)
    free, waiting = [True] * slots, ghosts
    for pair in costs.flatten().argsort(stable=True).tolist():
        if not waiting:
            break
        ghost, slot = divmod(pair, slots)
        if taken[ghost] < 0 and free[slot]:
            taken[ghost], free[slot] = slot, False
            waiting -= 1
    for _ in range(ghosts * ghosts):
        now = costs.gather(1, taken[:, None])  # [ghosts, 1]
        swapped = costs[:, taken]  # [a, b]: ghost a in the slot of b
        change = swapped + swapped.t() - now - now.t()
        best = int(change.argmin()) if ghosts else 0
        if not ghosts or change.flatten()[best] > -1e-12:
            break
        a, b = divmod(best, ghosts)
        taken[[a, b]] = taken[[b, a]]
    return taken


@torch.no_grad()
def write(layer: GhostConv2d, conv: nn.Conv2d, norm: Any, fit: Fit, moments: Moments) -> None:
    """Gives a layer the filters of a fit, and its norms the statistics that its channels then have."""
    kept, flat = fit.primary, fit.ghosts.flatten()
    used = flat >= 0
    made = flat.clamp(min=0)
    filters = fit.weight[made] * used[:, None]
    layer.primary.weight.copy_(conv.weight[kept])
    layer.cheap.weight.copy_(filters.view_as(layer.cheap.weight))
    assert layer.order is not None
    layer.order.copy_(fit.order)
    if layer.primary.bias is not None and conv.bias is not None:
        layer.primary.bias.copy_(conv.bias[kept])
    source = fit.source[made]
    mean = (filters * moments.shifted_mean[source]).sum(1)
    shift = torch.where(used, moments.mean[made], 0.0)  # what the channel's mean is to be
    if norm is None:
        if layer.cheap.bias is not None:
            layer.cheap.bias.copy_(shift - mean)
        return
    own: Any = layer.primary_norm
    for key in ("weight", "bias", "running_mean", "running_var"):
        getattr(own, key).copy_(getattr(norm, key)[kept])
    variance = torch.einsum("gt,gts,gs->g", filters, moments.own[source], filters).clamp(min=0)
    cheap: Any = layer.cheap_norm
    cheap.running_mean.copy_(mean)
    cheap.running_var.copy_(variance)
    cheap.weight.copy_((variance + cheap.eps).sqrt())
    cheap.bias.copy_(shift)
