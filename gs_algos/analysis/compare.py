"""Compares a compressed network with the float one it was made from, layer by layer, on the same inputs.

The output of a compressed layer is compared with what the float network has at the same place: behind the batch norm
and the activation that the compressed layer computes in its own call. Errors are signal-to-noise ratios of the
quantization, `SQNR = 10 log10(sum y^2 / sum (y' - y)^2)` in dB: cumulative, each network on its own inputs, and local,
the compressed layer on the float network's inputs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.comparison import Comparison, Histogram, JoinComparison, LayerComparison
from gs_algos.analysis.layers import (
    JoinFacts,
    LayerFacts,
    join_facts,
    layer_facts,
    range_of,
    some_of,
    stacked_note,
    taken_over,
)
from gs_algos.core.algorithm import Inputs, evaluating, history, run
from gs_algos.core.batches import InputsOf, checked_batches, tensor_in
from gs_algos.core.modules import TRACING, get_module
from gs_algos.core.network import network_of, ordinary_tensors, without_autocast
from gs_algos.quant.integer.quantized_tensor import dequantized
from gs_kernels.activations import ACTIVATIONS
from gs_kernels.runtime.torch_private import _BatchNorm, tree_leaves

WHO = "compare"
CHANGED_BASIS = ("rotate", "equalize", "relayernorm")  # transforms after which some layers hold other values


def compare(before: nn.Module, after: nn.Module, batches: Iterable[Inputs]) -> Comparison:
    """Compares a compressed network with the float one, layer by layer. Both are left as they were.

    Args:
        before: the float network.
        after: what was made of it: converted, prepared, pruned or packed, with the same names of layers.
        batches: of inputs, or of (inputs, labels); some dozen images or some thousand tokens are enough.

    Raises:
        ValueError: if there is no batch, the networks have no layer of one name in common, or their outputs have
            different shapes.
    """
    first, second = network_of(before, WHO), network_of(after, WHO)
    inputs_of = InputsOf(WHO, first, None)
    data = [inputs_of(batch) for batch in checked_batches(WHO, batches)]
    if not data:
        raise ValueError(f"{WHO}: at least one batch must be given, got none")
    facts = layer_facts(first, second)
    if not any(fact.before is not None for fact in facts):
        raise ValueError(
            f"{WHO}: both networks must have layers of the same names, got none in common: "
            f"{some_of(name for name, _ in first.named_modules() if name)}, and {some_of(fact.site for fact in facts)}"
        )
    watches = {fact.site: _Watch(fact) for fact in facts}
    joins = [(fact, _Errors()) for fact in join_facts(first, second)]
    outputs, taken = _Errors(), taken_over(first, second)
    with ordinary_tensors(), without_autocast(), TRACING, evaluating(first), evaluating(second):
        for batch in data:
            want = _observe_float(first, batch, watches, taken, joins)
            got = _observe_compressed(second, batch, watches)
            if [tuple(t.shape) for t in want] != [tuple(t.shape) for t in got]:
                shapes = [[list(t.shape) for t in found] for found in (want, got)]
                raise ValueError(
                    f"{WHO}: both networks must give outputs of one shape, got {shapes[0]} and {shapes[1]}"
                )
            for a, b in zip(want, got, strict=True):
                outputs.update(a, b)
    changed = sorted({name for entry in history(after) for name in entry["config"].get("transforms") or ()})
    other_basis = [name for name in changed if name in CHANGED_BASIS]
    ran = sorted(watches.values(), key=lambda watch: (watch.turn is None, watch.turn or 0))
    layers = tuple(watch.result(bool(other_basis)) for watch in ran)
    joined = [
        JoinComparison(fact.site, str(fact.grid.scheme), fact.layer, fact.places, range_of(fact.grid), errors.sqnr())
        for fact, errors in joins
        if errors.count
    ]
    notes = [*_notes(ran, layers, other_basis), *filter(None, [stacked_note(second)])]
    return Comparison(layers, outputs.sqnr(), tuple(notes), tuple(joined))


class _Errors:
    """Sums squares of outputs, of differences and products, over all batches."""

    def __init__(self) -> None:
        self.want = self.got = self.difference = self.product = 0.0
        self.count = 0

    def update(self, want: Tensor, got: Tensor) -> None:
        a, b = want.double(), got.double()
        self.want += float(a.square().sum())
        self.got += float(b.square().sum())
        self.difference += float((b - a).square().sum())
        self.product += float((a * b).sum())
        self.count += a.numel()

    def sqnr(self) -> float:
        if not math.isfinite(self.difference) or not math.isfinite(self.want):
            return math.nan
        if self.difference == 0:
            return math.inf
        return 10 * math.log10(self.want / self.difference) if self.want else -math.inf

    def cosine(self) -> float:
        size = math.sqrt(self.want) * math.sqrt(self.got)
        return self.product / size if size else 1.0 if self.difference == 0 else 0.0


class _Watch:
    """Collects what is to know of one layer while both networks run."""

    def __init__(self, fact: LayerFacts) -> None:
        self.fact = fact
        self.cumulative, self.local = _Errors(), _Errors()
        self.want: list[Tensor] = []  # of the float network's calls with this batch
        self.got: list[Tensor] = []  # of the compressed layer on the inputs of these calls
        self.norms: list[nn.Module] = []  # that the compressed weight holds
        self.turn: int | None = None  # when it ran first
        self.inputs: Histogram | None = None
        self.outside = self.seen = 0

    def see_input(self, x: Tensor) -> None:
        """Notes an input of the float layer."""
        if not x.is_floating_point():
            return
        if self.inputs is None:
            self.inputs = Histogram.of(x)
        if self.fact.input_range is not None:
            low, high, half = (*self.fact.input_range, self.fact.input_step / 2)
            self.outside += int(((x < low - half) | (x > high + half)).sum())
            self.seen += x.numel()

    def see_output(self, y: Tensor, errors: _Errors, want: Tensor) -> None:
        if want.shape == y.shape:
            errors.update(want, y)

    def result(self, other_basis: bool) -> LayerComparison:
        fact = self.fact
        sqnr, local, cosine = (
            found() if errors.count else None
            for found, errors in (
                (self.cumulative.sqnr, self.cumulative),
                (self.local.sqnr, self.local),
                (self.cumulative.cosine, self.cumulative),
            )
        )
        if other_basis and sqnr is not None and sqnr < 0:
            sqnr = local = cosine = None
        values, grid = fact.weight_picture(self.norms)
        return LayerComparison(
            site=fact.site,
            kind=fact.kind,
            weight=fact.weight,
            act=fact.act,
            bits=fact.bits,
            nbytes=fact.nbytes,
            float_nbytes=fact.float_nbytes,
            sqnr=sqnr,
            local_sqnr=local,
            cosine=cosine,
            clipped=self.outside / self.seen if self.seen else None,
            levels_used=fact.levels_used,
            levels=fact.levels,
            weight_values=None if values is None else Histogram.of(values),
            weight_grid=grid,
            input_values=self.inputs,
            input_range=fact.input_range,
            share_zero=fact.share_zero,
            float_site=fact.float_site,
        )


def _observe_float(
    network: nn.Module,
    batch: Inputs,
    watches: Mapping[str, _Watch],
    taken: Mapping[str, nn.Module],
    joins: Iterable[tuple[JoinFacts, _Errors]],
) -> list[Tensor]:
    """Runs the float network; keeps the outputs of layers, and compares compressed layers and adds on its values.

    taken: modules whose work the compressed layers do: the output of a layer is what the last of them makes of it.
    """
    newest: dict[int, tuple[weakref.ref[Tensor], _Watch]] = {}  # the tensor that holds a layer's output so far

    def before_layer(watch: _Watch) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            watch.see_input(tensor_in((args, kwargs)))
            if watch.fact.comparable:
                watch.got.append(_values(watch.fact.run(*args, **kwargs)).clone())

        return hook

    def note(watch: _Watch, y: Any) -> None:
        tensor = tensor_in(y)
        newest[id(tensor)] = weakref.ref(tensor), watch
        watch.want[-1] = tensor.detach().clone()  # what follows may change it in place

    def behind_layer(watch: _Watch) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            watch.want.append(torch.empty(0))
            note(watch, y)

        return hook

    def behind_taken(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        x = tensor_in((args, kwargs))
        held = newest.get(id(x))
        if held is not None and held[0]() is x:
            note(held[1], y)
            if isinstance(module, _BatchNorm) and module not in held[1].norms:
                held[1].norms.append(module)

    def operand(grid: Any, errors: _Errors) -> Any:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            errors.update(tensor_in(y), dequantized(grid(tensor_in(y))))

        return hook

    with ExitStack() as stack:
        for fact, errors in joins:
            for place in fact.places:
                hook = operand(fact.grid, errors)
                stack.callback(get_module(network, place).register_forward_hook(hook, prepend=True).remove)
        for watch in watches.values():
            watch.want, watch.got = [], []
            if watch.fact.before is None:
                continue
            layer = watch.fact.before
            stack.callback(layer.register_forward_pre_hook(before_layer(watch), with_kwargs=True).remove)
            hook = behind_layer(watch)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        for module in taken.values():
            stack.callback(module.register_forward_hook(behind_taken, with_kwargs=True, prepend=True).remove)
        outputs = _floats(run(network, batch, WHO))
    for watch in watches.values():
        watch.want = [_activation(watch.fact.activation)(want) for want in watch.want]
        for want, got in zip(watch.want, watch.got, strict=False):
            watch.see_output(got, watch.local, want)
        watch.got = []
    return outputs


def _observe_compressed(network: nn.Module, batch: Inputs, watches: Mapping[str, _Watch]) -> list[Tensor]:
    """Runs the compressed network and compares the outputs of its layers with those that were kept."""
    ran = sum(watch.turn is not None for watch in watches.values())

    def after_layer(watch: _Watch) -> Any:
        calls = iter(list(watch.want))

        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            nonlocal ran
            if watch.turn is None:
                watch.turn, ran = ran, ran + 1
            want = next(calls, None)
            if want is not None:
                watch.see_output(_values(y), watch.cumulative, want)

        return hook

    with ExitStack() as stack:
        for watch in watches.values():
            stack.callback(
                watch.fact.place.register_forward_hook(after_layer(watch), with_kwargs=True, prepend=True).remove
            )
        return [dequantized(t) for t in _floats(run(network, batch, WHO))]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS[name].function if name else lambda y: y


def _values(y: Any) -> Tensor:
    return dequantized(tensor_in(y)).detach()  # type: ignore[no-any-return]


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _notes(watches: list[_Watch], layers: tuple[LayerComparison, ...], other_basis: list[str]) -> list[str]:
    notes = []
    idle = [watch.fact.site for watch in watches if watch.turn is None]
    lone = [watch.fact.site for watch in watches if watch.fact.before is None]
    cut = [watch.fact.site for watch in watches if watch.fact.before is not None and not watch.fact.comparable]
    broken = [one.site for one in layers if one.sqnr is not None and math.isnan(one.sqnr)]
    for names, words in (
        (idle, "did not run on these inputs"),
        (lone, "are not in the float network"),
        (cut, "have another shape than in the float network, so their outputs are not compared"),
        (broken, "give NaN or Inf"),
    ):
        if names:
            notes.append(f"{len(names)} layers {words}: {some_of(names)}")
    hidden = sum(one.sqnr is None for one in layers) - len({*idle, *lone, *cut})
    if other_basis and hidden > 0:
        notes.append(f"{hidden} layers hold other values than the float network's after {', '.join(other_basis)}")
    return notes
