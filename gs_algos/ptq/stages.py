"""Finds the stages of a block: the layers that read one tensor, in the order they are called in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gs_algos.core.algorithm import evaluating
from gs_algos.core.input_rows import CONVS
from gs_algos.ptq.blocks import Block, recorded
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.routed import Route, containers_of, find_routes, routed_rows, source_rows
from gs_algos.ptq.streams import Streams, stop, stopped


@dataclass(frozen=True)
class Stage:
    """Describes layers that read the same rows, so that one statistic serves all.

    calls: how often the first of them is called in one forward; 0 if no batch reached it.
    route: where the rows come from, of layers that read only some, such as those of experts.
    """

    sites: tuple[str, ...]
    calls: int
    route: Route | None = None

    @property
    def first(self) -> str:
        return self.sites[0]


def find_stages(streams: Streams, block: Block, layers: Mapping[str, Rounded]) -> list[Stage]:
    """Returns the stages of a block, from as many batches as it takes to see every layer called.

    Layers that no batch reaches, such as experts without a token, are stages of their own at the end.
    """
    seen: dict[str, Any] = {}
    counts: dict[str, int] = {}
    held: list[Tensor] = []  # so that no tensor takes the identity of another

    def hook(site: str) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            x = input_of(args, kwargs)
            held.append(x)
            seen.setdefault(site, (id(x), _geometry(layers[site])))
            counts[site] = counts.get(site, 0) + 1

        return before

    routes: dict[str, Route] = {}
    inside = [site for site in layers if containers_of(streams.model, block, site)]
    for number in range(len(streams.batches)):
        before = dict(counts)
        with ExitStack() as stack:
            if inside and not routes:
                modules = [(name, one) for name, one in streams.model.named_modules() if block.holds(name)]
                calls = stack.enter_context(recorded(modules))
            for site, layer in layers.items():
                if site not in before:
                    stack.callback(layer.register_forward_pre_hook(hook(site), with_kwargs=True).remove)
            streams.run_block(block, number, streams.quantized)
            if inside and not routes:
                routes = find_routes(streams.model, block, inside, calls)
        if len(counts) == len(layers):
            break
    groups: dict[Any, list[str]] = {}
    for site, key in seen.items():
        groups.setdefault(key if counts[site] == 1 else site, []).append(site)
    stages = [Stage(tuple(sites), counts[sites[0]], routes.get(sites[0])) for sites in groups.values()]
    return stages + [Stage((site,), 0, routes.get(site)) for site in layers if site not in counts]


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns what a layer is called with: its only argument, by position or by name."""
    return next(iter((*args, *kwargs.values())))


def _geometry(layer: Any) -> Any:
    """Returns what makes two layers read different rows of one tensor."""
    if isinstance(layer, CONVS):
        form = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return form, layer.act
    return layer.act


@contextmanager
def seen_by(layer: Rounded, calls: int, ends: bool) -> Iterator[list[Tensor]]:
    """Collects the inputs of one layer in the forward passes of the block.

    ends: whether the forward pass stops at the layer's last call.
    """
    inputs: list[Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        inputs.append(input_of(args, kwargs).detach())
        if ends and len(inputs) == calls:
            stop()

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def inputs_of(
    streams: Streams, block: Block, number: int, layer: Rounded, calls: int, route: Route | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what one layer sees in the quantized stream of one batch, and which rows of its route's source these are.

    The block is run up to the layer's last call.
    """
    with routed_rows(streams.model, route) as places, seen_by(layer, calls, ends=True) as inputs:
        streams.run_block(block, number, streams.quantized)
    return inputs, places


def all_inputs(
    streams: Streams, block: Block, number: int, stages: Sequence[Stage], layers: Mapping[str, Rounded]
) -> tuple[dict[str, tuple[list[Tensor], list[Tensor]]], Tensor | None]:
    """Returns what `inputs_of` does for every stage, in the float stream, and the block's output."""
    with ExitStack() as stack:
        seen = {}
        for stage in stages:
            places = stack.enter_context(routed_rows(streams.model, stage.route))
            seen[stage.first] = stack.enter_context(seen_by(layers[stage.first], stage.calls, False)), places
        output = streams.run_block(block, number, streams.floats)
    return seen, output


def unrouted_input(
    streams: Streams, block: Block, number: int, layer: Rounded, route: Route, mask: Tensor | None
) -> Tensor:
    """Returns what one layer would see in the quantized stream of one batch if it read all rows of the source."""
    rows = source_rows(streams, block, number, route, mask)
    with evaluating(streams.model), seen_by(layer, 1, ends=True) as inputs, stopped():
        streams.model.get_submodule(route.module)(rows)
    return inputs[0]
