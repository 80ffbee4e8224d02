"""Finds the stages of a block: the layers that read one tensor, in the order they are called in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gs_algos.ptq.blocks import Block
from gs_algos.ptq.columns import CONVS
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.streams import Streams, stop


@dataclass(frozen=True)
class Stage:
    """Describes layers that read the same rows, so that one statistic serves all.

    calls: how often the first of them is called in one forward; 0 if no batch reached it.
    """

    sites: tuple[str, ...]
    calls: int

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

    for number in range(len(streams.batches)):
        before = dict(counts)
        with ExitStack() as stack:
            for site, layer in layers.items():
                if site not in before:
                    stack.callback(layer.register_forward_pre_hook(hook(site), with_kwargs=True).remove)
            streams.run_block(block, number, streams.quantized)
        if len(counts) == len(layers):
            break
    groups: dict[Any, list[str]] = {}
    for site, key in seen.items():
        groups.setdefault(key if counts[site] == 1 else site, []).append(site)
    stages = [Stage(tuple(sites), counts[sites[0]]) for sites in groups.values()]
    return stages + [Stage((site,), 0) for site in layers if site not in counts]


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


def inputs_of(streams: Streams, block: Block, number: int, layer: Rounded, calls: int) -> list[Tensor]:
    """Returns what one layer sees in the quantized stream of one batch; the block is run up to its last call."""
    with seen_by(layer, calls, ends=True) as inputs:
        streams.run_block(block, number, streams.quantized)
    return inputs


def all_inputs(
    streams: Streams, block: Block, number: int, stages: Sequence[Stage], layers: Mapping[str, Rounded]
) -> tuple[dict[str, list[Tensor]], Tensor | None]:
    """Returns what the first layer of every stage sees of one batch in the float stream, and the block's output."""
    with ExitStack() as stack:
        seen = {stage.first: stack.enter_context(seen_by(layers[stage.first], stage.calls, False)) for stage in stages}
        output = streams.run_block(block, number, streams.floats)
    return seen, output
