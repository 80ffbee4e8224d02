"""Finds layers that read some rows of a tensor, as those of experts do, and tells which rows these are.

Few tokens say little of a layer's input. What the other tokens would show an expert then counts, too: measured on
clusters of tokens in SmolLM2-135M (int4@group:64, objective over rounding to nearest, on other tokens), a gate of 576
columns goes from 0.87 to 0.45 with 1 token and from 0.49 to 0.44 with 128, and from 512 on nothing is gained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.ptq.blocks import Block, Call, first_tensor
from gs_algos.ptq.streams import Streams, stop

LENT = 0.5  # times the columns: tokens that all rows of the source count as
SEED = 0
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Route:
    """Says where the rows of a layer come from.

    Args:
        module: the layer or a module around it, such as an expert, which gets some rows of what source gets.
        source: a module around several of them.
    """

    module: str
    source: str


def containers_of(model: nn.Module, block: Block, site: str) -> list[str]:
    """Returns the lists and dicts of several modules that hold a layer inside a block, the innermost first."""
    found = []
    for name in _above(site):
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1 and block.holds(name):
            found.append(name)
    return found


def find_routes(model: nn.Module, block: Block, sites: Collection[str], calls: Mapping[str, Call]) -> dict[str, Route]:
    """Returns the routes of the layers of a block that are in a list of modules that each read some rows of one tensor.

    calls: of the modules in one forward pass. A layer that was not called has the route of the same layer beside it.
    """
    found: dict[str, Route] = {}
    beside: dict[tuple[str, str], tuple[str, str]] = {}  # container, rest of the site -> rest of the module, source
    places = [
        (site, container, *site.removeprefix(f"{container}.").partition(".")[::2])
        for site in sites
        for container in containers_of(model, block, site)
    ]
    for site, container, child, rest in places:
        inside = f"{container}.{child}"
        route = next(
            (
                Route(module, source)
                for module in (site, *_above(site))
                if module == inside or module.startswith(f"{inside}.")
                for source in (container, *_above(container))
                if _reads_some(calls.get(module), calls.get(source))
            ),
            None,
        )
        if route is not None:
            found.setdefault(site, route)
            beside[container, rest] = route.module.removeprefix(inside), route.source
    for site, container, child, rest in places:
        if site not in found and site not in calls and (container, rest) in beside:
            module, source = beside[container, rest]
            found[site] = Route(f"{container}.{child}{module}", source)
    return found


def _above(name: str) -> list[str]:
    """Returns the names of the modules around one, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _reads_some(inner: Call | None, outer: Call | None) -> bool:
    """Says whether a module got nothing but some of the rows of what another got."""
    if inner is None or outer is None or inner.others or inner.first is None or outer.first is None:
        return False
    x, source = inner.first, outer.first
    fit = x.is_floating_point() and x.dtype == source.dtype and min(x.dim(), source.dim()) > 1
    if not fit or x.shape[-1] != source.shape[-1] or not 0 < x.numel() < source.numel():
        return False
    return bool((places_of(row_keys(x), row_keys(source)) >= 0).all())


def row_keys(x: Tensor) -> Tensor:
    """Returns an integer for each row of `x [..., K]`, `[T]`: equal for rows with the same bits."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    factors = torch.randint(1, 2**62, rows.shape[1:], generator=torch.Generator().manual_seed(SEED), device="cpu")
    return (rows.view(INTEGERS[rows.itemsize]).long() * (2 * factors + 1).to(rows.device)).sum(1)


def places_of(keys: Tensor, among: Tensor) -> Tensor:
    """Returns where each key is among others, `[T]`; -1 for those that are not there."""
    if not len(among):
        return torch.full_like(keys, -1)
    ordered, order = among.sort(stable=True)
    at = torch.searchsorted(ordered, keys).clamp_(max=len(among) - 1)
    return torch.where(ordered[at] == keys, order[at], -1)


@contextmanager
def routed_rows(model: nn.Module, route: Route | None) -> Iterator[list[Tensor]]:
    """Collects, call by call, which rows of the source the routed module gets in the forward passes of the block."""
    found: list[Tensor] = []
    keys = torch.empty(0, dtype=torch.int64, device="cpu")

    def source(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal keys
        keys = row_keys(_input(args, kwargs))

    def routed(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(places_of(row_keys(_input(args, kwargs)), keys))

    with ExitStack() as stack:
        for name, hook in ((route.source, source), (route.module, routed)) if route is not None else ():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def source_rows(streams: Streams, block: Block, number: int, route: Route, mask: Tensor | None) -> Tensor:
    """Returns all rows `[T, K]` that the source gets in the quantized stream of one batch, of tokens that count."""
    found: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(_input(args, kwargs).detach())
        stop()

    handle = streams.model.get_submodule(route.source).register_forward_pre_hook(before, with_kwargs=True)
    try:
        streams.run_block(block, number, streams.quantized)
    finally:
        handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
    return rows[mask.flatten()] if mask is not None and mask.numel() == len(rows) else rows


def _input(args: Any, kwargs: Any) -> Tensor:
    x = first_tensor((args, kwargs))
    assert x is not None
    return x
