"""Puts ghost layers into the private copy on which policies are scored, fitted to its outputs on the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.modules import get_module, set_module
from gs_algos.ghost.fit import Moments, OutputWatch, fitted, write
from gs_algos.ghost.layers import GhostConv2d
from gs_algos.ghost.planning import GhostPlan, put_in
from gs_algos.search.target import Target


class GhostTrials:
    """Makes the ghost layers of a network, each once, and puts some of them in its place for a while."""

    def __init__(self, targets: Sequence[Target], network: nn.Module, batches: Sequence[Inputs], who: str) -> None:
        self.network, self.batches, self.who = network, batches, who
        rows = [row for target in targets for row in target.rows]
        self.plans: dict[str, GhostPlan] = {r.site: r.settings for r in rows if isinstance(r.settings, GhostPlan)}
        self._layer = lru_cache(maxsize=None)(self._made)

    @contextmanager
    def put_in(self, ratios: Mapping[str, int]) -> Iterator[None]:
        """Replaces layers for the duration of the block. ratios: layer -> its ratio."""
        layers = {site: self._layer(site, ratio) for site, ratio in ratios.items()}
        with ExitStack() as stack:
            for site, layer in layers.items():
                norm = self.plans[site].norm
                for name in (site, norm):
                    if name is not None:
                        stack.callback(set_module, self.network, name, get_module(self.network, name))
                put_in(self.network, site, layer, norm)
            yield

    @torch.no_grad()
    def _made(self, site: str, ratio: int) -> GhostConv2d:
        plan, conv = self.plans[site], self._convs[site]
        norm = None if plan.norm is None else self._norms[site]
        with torch.random.fork_rng(devices=[]):
            layer = GhostConv2d(conv, norm, ratio, plan.kernel, ordered=True)
        known = self._moments[site][0]
        write(layer, conv, norm, fitted(known, ratio), known)
        return layer.eval().requires_grad_(False)

    @cached_property
    def _convs(self) -> dict[str, Any]:
        return {site: get_module(self.network, site) for site in self.plans}

    @cached_property
    def _norms(self) -> dict[str, nn.Module]:
        return {site: get_module(self.network, plan.norm) for site, plan in self.plans.items() if plan.norm is not None}

    @cached_property
    def _moments(self) -> dict[str, tuple[Moments, Moments]]:
        """Runs the network as it is over the data."""
        sizes = {site: (conv.out_channels, self.plans[site].kernel) for site, conv in self._convs.items()}
        watch = OutputWatch({**self._convs, **self._norms}, sizes, self.who)
        try:
            with evaluating(self.network):
                for batch in self.batches:
                    run(self.network, batch, self.who)
        finally:
            watch.remove()
        return watch.moments()
