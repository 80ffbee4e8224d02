"""Tries what compression would do to a network without training it: knobs are set on a private copy and unset again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of
from gs_algos.pruning.channel_groups.groups import Groups
from gs_algos.pruning.cut import mask, zeros
from gs_algos.quant.packed.grid import Grid, grid_of
from gs_algos.quant.packed.packable import matrix_of
from gs_algos.quant.scheme import Scheme
from gs_kernels import choose_qparams, fake_quant
from gs_kernels.runtime.torch_private import tree_map_only

ToGrid: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Policy:
    """Says to what a network is rounded, and which of its channels go.

    Args:
        weights: layer -> scheme of its weight.
        acts: layer -> scheme of its inputs.
        joins: add or concat -> scheme of its operands.
        kept: groups of channels, and which of their units stay, bool `[units]`; None: all.
    """

    weights: Mapping[str, str]
    acts: Mapping[str, str] = field(default_factory=dict)
    joins: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[Groups, Tensor] | None = None

    def raised(self, schemes: Mapping[str, str]) -> Policy:
        """Returns a policy that gives other schemes to some weights."""
        return replace(self, weights={**self.weights, **schemes})


class Probe:
    """Holds a copy of a network in eval mode that can be rounded for a while: weights, inputs of layers, operands.

    network: the copy. Weights are rounded to nearest; channels that go are zeros.
    ranges: layer, add or concat -> smallest and largest value of what is rounded in front of it.
    operands: add or concat -> modules that give its operands.
    integer: layers that multiply integers once compressed, whose scales are above 0.
    """

    def __init__(self, model: nn.Module, who: str, integer: Collection[str] = ()) -> None:
        self.who, self.integer = who, frozenset(integer)
        self.network = copy.deepcopy(network_of(model, who)).eval().requires_grad_(False)
        self._grids: dict[tuple[str, str], Grid] = {}
        self._masked = False
        self.ranges: dict[str, tuple[float, float]] = {}
        self.operands: dict[str, tuple[str, ...]] = {}

    def layer(self, site: str) -> Any:
        return get_module(self.network, site)

    def rounded(self, site: str, scheme: str) -> Tensor:
        """Returns the weight of a layer on the grid of a scheme, in the shape of the weight.

        Raises:
            ValueError: if a group does not divide the weight, or it is NaN or Inf.
        """
        layer = self.layer(site)
        rows = matrix_of(layer, layer.weight)
        grid = self._grid(site, scheme, rows)
        values = grid.values(grid.codes(rows)).to(layer.weight.dtype)
        return values.view(layer.weight.shape) if rows.shape[0] == layer.weight.shape[0] else values.t()

    def _grid(self, site: str, scheme: str, rows: Tensor) -> Grid:
        """Returns the grid of a weight; of one whose channels are masked it is a new one each time."""
        if self._masked or (site, scheme) not in self._grids:
            grid = grid_of(rows, Scheme.parse(scheme, "weight"), positive=site in self.integer)
            if self._masked:
                return grid
            self._grids[site, scheme] = grid
        return self._grids[site, scheme]

    @torch.no_grad()
    def find_ranges(self, batches: Sequence[Inputs], sites: Sequence[str]) -> None:
        """Finds the smallest and largest input of layers, with the weights as they are now."""
        found: dict[str, list[float]] = {}

        def watch(site: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = tensor_in((args, kwargs))
                if x.is_floating_point() and x.numel():
                    found.setdefault(site, []).extend((float(x.min()), float(x.max())))

            return hook

        with ExitStack() as stack:
            for site in sites:
                handle = self.layer(site).register_forward_pre_hook(watch(site), with_kwargs=True)
                stack.callback(handle.remove)
            for batch in batches:
                run(self.network, batch, self.who)
        self.ranges |= {site: (min(0.0, *ends), max(0.0, *ends)) for site, ends in found.items()}

    @contextmanager
    def set(self, policy: Policy) -> Iterator[None]:
        """Rounds what a policy names for the duration of the block; what has no range stays float."""
        held: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as stack, torch.no_grad():
            try:
                if policy.kept is not None:
                    gone = zeros(self.network, *policy.kept)
                    held += [(t, t.clone()) for t in {id(t): t for t, _, _ in gone}.values()]
                    mask(self.network, *policy.kept)
                    self._masked = True
                done: set[int] = set()
                for site, scheme in policy.weights.items():
                    weight = self.layer(site).weight
                    if id(weight) not in done:  # a tied one is rounded once
                        held.append((weight, weight.clone()))
                        weight.copy_(self.rounded(site, scheme))
                        done.add(id(weight))
                for site, scheme in policy.acts.items():
                    if site in self.ranges:
                        hook = _on_inputs(self._to_grid(site, scheme))
                        stack.callback(self.layer(site).register_forward_pre_hook(hook, with_kwargs=True).remove)
                for site, scheme in policy.joins.items():
                    for place in self.operands[site]:
                        hook = _on_outputs(self._to_grid(site, scheme))
                        stack.callback(self.layer(place).register_forward_hook(hook).remove)
                yield
            finally:
                self._masked = False
                for weight, values in reversed(held):
                    weight.copy_(values)

    @torch.no_grad()
    def round(self, policy: Policy) -> None:
        """Rounds the weights that the policy names as they are now, inside `set`, after a change of them."""
        for site, scheme in policy.weights.items():
            self.layer(site).weight.copy_(self.rounded(site, scheme))

    def _to_grid(self, site: str, text: str) -> ToGrid:
        """Returns what rounds a tensor to the grid of a scheme over the range of a site."""
        scheme = Scheme.parse(text, "act")
        low, high = (torch.tensor([end]) for end in self.ranges[site])
        scale, zero = choose_qparams(low, high, qmin=scheme.qmin, qmax=scheme.qmax, symmetric=scheme.symmetric)
        return lambda x: fake_quant(x, scale.to(x.device), zero.to(x.device), qmin=scheme.qmin, qmax=scheme.qmax)


def _on_inputs(to_grid: ToGrid) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        first = tensor_in((args, kwargs))
        return tree_map_only(Tensor, lambda x: to_grid(x) if x is first else x, (args, kwargs))

    return hook


def _on_outputs(to_grid: ToGrid) -> Any:
    def hook(module: nn.Module, args: Any, y: Any) -> Any:
        first = tensor_in(y)
        return tree_map_only(Tensor, lambda x: to_grid(x) if x is first else x, y)

    return hook
