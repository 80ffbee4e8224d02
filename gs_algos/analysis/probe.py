"""Tries what compression would do to a network without training it: knobs are set on a private copy and unset again."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of
from gs_algos.quant.packed.grid import Grid, grid_of
from gs_algos.quant.packed.packable import matrix_of
from gs_algos.quant.scheme import Scheme
from gs_kernels import choose_qparams, fake_quant
from gs_kernels.runtime.torch_private import tree_map_only


class Probe:
    """Holds a copy of a network in eval mode whose weights and inputs of layers can be rounded for a while.

    network: the copy. Weights are rounded to nearest.
    ranges: layer -> smallest and largest value of its inputs, on whose grid they are rounded.
    integer: layers that multiply integers once compressed, whose scales are above 0.
    """

    def __init__(self, model: nn.Module, who: str, integer: Collection[str] = ()) -> None:
        self.who, self.integer = who, frozenset(integer)
        self.network = copy.deepcopy(network_of(model, who)).eval().requires_grad_(False)
        self._grids: dict[tuple[str, str], Grid] = {}
        self.ranges: dict[str, tuple[float, float]] = {}

    def layer(self, site: str) -> Any:
        return get_module(self.network, site)

    def rounded(self, site: str, scheme: str) -> Tensor:
        """Returns the weight of a layer on the grid of a scheme, in the shape of the weight.

        Raises:
            ValueError: if a group does not divide the weight, or it is NaN or Inf.
        """
        layer = self.layer(site)
        rows = matrix_of(layer, layer.weight)
        if (site, scheme) not in self._grids:
            self._grids[site, scheme] = grid_of(rows, Scheme.parse(scheme, "weight"), positive=site in self.integer)
        grid = self._grids[site, scheme]
        values = grid.values(grid.codes(rows)).to(layer.weight.dtype)
        return values.view(layer.weight.shape) if rows.shape[0] == layer.weight.shape[0] else values.t()

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
    def set(self, weights: Mapping[str, str], acts: Mapping[str, str] | None = None) -> Iterator[None]:
        """Rounds weights, and the inputs of layers, for the duration of the block.

        Args:
            weights: layer -> scheme of its weight.
            acts: layer -> scheme of its inputs, for layers whose range `find_ranges` found; others stay float.
        """
        held: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as stack, torch.no_grad():
            try:
                done: set[int] = set()
                for site, scheme in weights.items():
                    weight = self.layer(site).weight
                    if id(weight) not in done:  # a tied one is rounded once
                        held.append((weight, weight.clone()))
                        weight.copy_(self.rounded(site, scheme))
                        done.add(id(weight))
                for site, scheme in (acts or {}).items():
                    if site in self.ranges:
                        handle = self.layer(site).register_forward_pre_hook(
                            self._rounder(site, scheme), with_kwargs=True
                        )
                        stack.callback(handle.remove)
                yield
            finally:
                for weight, values in held:
                    weight.copy_(values)

    def _rounder(self, site: str, text: str) -> Any:
        scheme = Scheme.parse(text, "act")
        low, high = (torch.tensor([end]) for end in self.ranges[site])
        scale, zero = choose_qparams(low, high, qmin=scheme.qmin, qmax=scheme.qmax, symmetric=scheme.symmetric)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            first = tensor_in((args, kwargs))

            def change(x: Tensor) -> Tensor:
                if x is not first:
                    return x
                return fake_quant(x, scale.to(x.device), zero.to(x.device), qmin=scheme.qmin, qmax=scheme.qmax)

            return tree_map_only(Tensor, change, (args, kwargs))

        return hook
