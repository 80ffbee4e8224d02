"""Measures where the milliseconds of a forward go: how many each layer takes inside the network, and what is left."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.layers import is_layer
from gs_algos.core.algorithm import Inputs, evaluating, run, split_inputs
from gs_algos.core.batches import device_of, on_device, samples_of
from gs_algos.core.network import network_of, ordinary_tensors, without_autocast
from gs_algos.core.table import Table
from gs_algos.core.timing import LEAST, WARM_UP
from gs_algos.quant.integer.quantized_tensor import DeferredOutput

WHO = "layer_times"
AGREE = 0.1  # of the total


@dataclass(frozen=True)
class LayerTimes:
    """Says where the milliseconds of a forward go.

    Args:
        total: ms of the network without hooks, median.
        layers: name -> ms inside the network, median; a layer that is called several times has the sum.
        rest: `total - sum(layers)`: what runs between layers, functions and Python.
        agrees: whether layers and rest tell the truth: the forward with hooks, which they were measured in, took no
            more than 10 % longer than the one without, and the layers together took no more than it.
        batch: samples of the forward.
        hooked: ms of the forward with hooks, median.
    """

    total: float
    layers: Mapping[str, float]
    rest: float
    agrees: bool
    batch: int
    hooked: float = 0.0

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Returns a table with a row for each layer, in the order they run."""
        rows = [(name, f"{ms:.3f}", f"{100 * ms / self.total:.1f} %") for name, ms in self.layers.items()]
        rows.append(("(between layers)", f"{self.rest:.3f}", f"{100 * self.rest / self.total:.1f} %"))
        below = [f"{self.total:.3f} ms a forward of {self.batch}"]
        if not self.agrees:
            below.append(
                f"with hooks it took {self.hooked:.3f} ms: the times of layers do not add up to that of the network "
                f"within {100 * AGREE:.0f} %"
            )
        return Table.of(("layer", "ms", "share"), rows, below=below)


def layer_times(net: nn.Module, inputs: Inputs, *, seconds: float = 1.0) -> LayerTimes:
    """Times a forward of the network in eval mode, and each layer in it. The network is left as it was.

    A layer is a module with a weight of its own, float or compressed, or one without modules inside. What a converted
    convolution leaves to the add behind it is counted as the convolution's, whoever reads the result. On a GPU the time
    of a layer is that between two events on its stream.

    Args:
        inputs: of one call.
        seconds: for how long is measured; five forwards at least, with hooks and without in turns.

    Raises:
        ValueError: if the inputs do not run through the network.
    """
    network = network_of(net, WHO)
    with ordinary_tensors(), without_autocast(), evaluating(network):
        given = on_device(inputs, device_of(network))
        for _ in range(WARM_UP):
            run(network, given, WHO)
        args, kwargs = split_inputs(given)
        clock = _Clock(device_of(network) or torch.device("cpu"))
        call = partial(network, *args, **kwargs)
        plain: list[float] = []
        hooked: list[float] = []
        layers: dict[str, list[float]] = defaultdict(list)
        with _watched(network, clock):
            clock.measure(call)
        stop = time.perf_counter() + seconds
        while len(plain) < LEAST or time.perf_counter() < stop:
            plain.append(clock.measure(call)[0])
            with _watched(network, clock):
                total, parts = clock.measure(call)
            hooked.append(total)
            for name, ms in parts.items():
                layers[name].append(ms)
    medians = {name: statistics.median(ms) for name, ms in layers.items()}
    total, with_hooks = statistics.median(plain), statistics.median(hooked)
    rest = total - sum(medians.values())
    agrees = abs(with_hooks - total) <= AGREE * total and rest >= -AGREE * total
    return LayerTimes(total, medians, rest, agrees, samples_of(given), with_hooks)


@dataclass
class _Span:
    """Holds one call of a layer: its start and end, and the calls inside, which are other layers' time."""

    name: str
    start: Any
    end: Any = None
    inside: list[_Span] = field(default_factory=list)


class _Clock:
    """Measures spans of time in a forward: with the clock of a CPU, or with events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[_Span] = []
        self.done: list[_Span] = []

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def enter(self, name: str) -> None:
        span = _Span(name, None)
        (self.open[-1].inside if self.open else self.done).append(span)
        self.open.append(span)
        span.start = self.now()

    def leave(self) -> None:
        now = self.now()
        self.open.pop().end = now

    def measure(self, call: Callable[[], Any]) -> tuple[float, dict[str, float]]:
        """Returns the ms of a call, and those of each layer that was entered in it."""
        self.open, self.done = [], []
        start = self.now()
        call()
        end = self.now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for span in self.done:
            self._add(span, found)
        return self._between(start, end), dict(found)

    def _add(self, span: _Span, found: dict[str, float]) -> float:
        """Adds the time of a span, without that of the spans inside; returns all of it."""
        whole = self._between(span.start, span.end)
        inside = sum(self._add(one, found) for one in span.inside)
        found[span.name] += whole - inside
        return whole

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self.device.type == "cuda" else 1000 * (end - start)


class _TimedRun:
    """Counts what a deferred output computes, whenever that is, as time of the layer that deferred it."""

    def __init__(self, run: Any, name: str, clock: _Clock) -> None:
        self.run, self.name, self.clock = run, name, clock
        self.adds, self.activations, self.to_grid = run.adds, run.activations, run.to_grid

    def __call__(self, residual: Tensor | None, activation: str, grid: Any) -> Tensor:
        self.clock.enter(self.name)
        try:
            return self.run(residual, activation, grid)  # type: ignore[no-any-return]
        finally:
            self.clock.leave()


@contextmanager
def _watched(net: nn.Module, clock: _Clock) -> Iterator[None]:
    """Tells the clock when layers are entered and left, for the duration of the block."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: clock.enter(name)

    def behind(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, y: Any) -> None:
            clock.leave()
            if type(y) is DeferredOutput:
                y.watch(lambda run: _TimedRun(run, name, clock))

        return leave

    with ExitStack() as stack:
        for name, layer in layers_in(net):
            stack.callback(layer.register_forward_pre_hook(before(name)).remove)
            stack.callback(layer.register_forward_hook(behind(name)).remove)
        yield


def layers_in(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists the modules that are timed, each once and none in another: those with a weight, those without children, and
    those that hold all parameters there are in them, such as the experts of a mixture.
    """
    found: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()
    for name, module in net.named_modules():
        if id(module) in inside or type(module) is nn.Identity:
            continue
        own = any(True for _ in module.parameters(recurse=False))
        whole = own and not any(True for child in module.children() for _ in child.parameters())
        if is_layer(module) or not module._modules or whole:
            found.append((name, module))
            inside |= {id(child) for child in module.modules()}
    return found
