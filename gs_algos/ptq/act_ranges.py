"""Chooses the range of what a layer reads by what rounding it changes of the network's output.

Each squared error of the layer's output counts as often as the squared gradient there: Yuan et al. 2022 (PTQ4ViT),
arXiv:2111.12293.
Differs from the paper: the gradient is that of the network's outputs, summed with random signs, so there need be no
classes; weights are rounded by then, so that ranges are searched once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run, without_parameter_gradients
from gs_algos.core.input_rows import CONVS, groups_of, input_rows
from gs_algos.core.progress import progress
from gs_algos.ptq.blocks import first_tensor
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.stages import input_of
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, passing
from gs_algos.quant.packed.packable import matrix_of
from gs_kernels import choose_qparams, score_candidates

logger = logging.getLogger(__name__)

SHARES = 0.01, 1.2, 100  # of the extremes: the first, the last, how many
ROWS = 1024  # of each layer, that candidates are scored on
PROBES = 4  # random signs that gradients are averaged over


@dataclass
class _Seen:
    """Holds what calibration showed of one layer.

    Args:
        readers: the first layer that reads the same tensor, which may be this one.
        extremes: (-min, max) of its input, `[2]`.
        rows: of its input, `[T, K]` each.
        squares: of the gradients at its output, `[T, N]` each, summed over probes.
    """

    layer: Any
    readers: str
    extremes: Tensor
    rows: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def search_ranges(
    model: nn.Module,
    quantizers: Mapping[str, ActivationQuantizer],
    batches: Sequence[Inputs],
    held_out: Sequence[Inputs],
    processes: Processes,
    who: str,
) -> None:
    """Moves the ranges of what linears and convolutions without groups read to the best of 100 shares of the extremes.

    A share is the better the less `sum (g (fake_quant(x) w^T - x w^T))^2` is, g the gradient at the layer's output.

    Layers that read one tensor get one range. Ranges that are observed stay where they are better for the network: its
    outputs on held-out batches are compared.

    Args:
        model: its weights are rounded, and its ranges are those that observers found.
        held_out: at least one batch.

    Raises:
        ValueError: if the network returns no floats.
    """
    seen = _gather(model, quantizers, batches, who)
    ranges = _best(seen, processes)
    before = {name: seen[name].layer.input_quantizer.range.clone() for name in ranges}
    errors = []
    for chosen in (before, ranges):
        for name, extremes in chosen.items():
            seen[name].layer.input_quantizer.set_initial_range(extremes, provisional=False)
        errors.append(_error(model, quantizers, held_out, processes, who))
    logger.info("%s: searched ranges: squared error of the outputs x %.3f", who, errors[1] / (errors[0] or 1.0))
    if not errors[1] < errors[0]:
        logger.warning("%s: searched ranges are no better than those observed, which stay", who)
        for name, extremes in before.items():
            seen[name].layer.input_quantizer.set_initial_range(extremes, provisional=False)


def _gather(
    model: nn.Module, quantizers: Mapping[str, ActivationQuantizer], batches: Sequence[Inputs], who: str
) -> dict[str, _Seen]:
    """Runs all batches with activations in float, and keeps rows of every layer that can be scored."""
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FakeQuantized) and layer.input_quantizer is not None and groups_of(layer) == 1
    }
    unseen = torch.full((2,), -torch.inf, dtype=torch.float32, device="cpu")
    seen = {name: _Seen(layer, name, unseen.to(layer.weight.device)) for name, layer in layers.items()}
    first: dict[tuple[int, int, str], str] = {}  # tensor, its version, scheme -> layer
    held: list[Tensor] = []  # so that no tensor takes the identity of another
    share = -(-ROWS // len(batches))

    def watch(name: str) -> Callable[..., Tensor]:
        def after(layer: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            x, one = input_of(args, kwargs).detach(), seen[name]
            if not x.numel():
                return y
            if not one.rows:
                held.append(input_of(args, kwargs))
                key = id(held[-1]), held[-1]._version, str(layer.input_quantizer.scheme)
                one.readers = first.setdefault(key, name)
            one.extremes = torch.maximum(one.extremes, torch.stack([-x.amin(), x.amax()]).float())
            rows = input_rows(layer, x)
            step = -(-len(rows) // share)
            one.rows.append(rows[::step].clone())
            if not y.requires_grad:
                y = y.detach().requires_grad_().clone()  # no leaf, which may not be changed in place
            squares = torch.zeros(len(one.rows[-1]), layer.weight.shape[0], dtype=torch.float32, device=y.device)
            one.squares.append(squares)

            def add(gradient: Tensor) -> None:
                squares.add_(_output_rows(layer, gradient)[::step].float().square())

            y.register_hook(add)
            return y

        return after

    with evaluating(model), passing(quantizers.values()), without_parameter_gradients(model), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name), with_kwargs=True).remove)
        for number, batch in enumerate(progress(batches, "searching ranges")):
            with torch.enable_grad():
                y = _output(model, batch, who)
            generator = torch.Generator().manual_seed(number)
            for probe in range(PROBES if y.requires_grad else 0):
                signs = torch.randint(0, 2, y.shape, generator=generator, device="cpu").to(y) * 2 - 1
                y.backward(signs, retain_graph=probe < PROBES - 1)
            held.clear()
            first.clear()
    return seen


def _output_rows(layer: Any, y: Tensor) -> Tensor:
    """Returns `[T, N]` of what a layer returns."""
    if not isinstance(layer, CONVS):
        return y.reshape(-1, y.shape[-1])
    spatial = len(layer.kernel_size)
    return y.reshape(-1, *y.shape[-spatial - 1 :]).movedim(1, -1).flatten(0, -2)


def _best(seen: Mapping[str, _Seen], processes: Processes) -> dict[str, Tensor]:
    """Returns the best range, (-min, max) `[2]`, of every layer whose scores tell candidates apart."""
    if not seen:
        return {}
    extremes = torch.stack([one.extremes for one in seen.values()])
    processes.largest(extremes)
    scores = torch.zeros(len(seen), SHARES[2], dtype=torch.float64, device=extremes.device)
    for number, one in enumerate(progress(list(seen.values()), "scoring ranges")):
        if one.rows:
            scores[number] = _scores(one, extremes[number])
    processes.add(scores)
    names = list(seen)
    ranges = torch.full_like(extremes, -torch.inf)
    shares = torch.linspace(*SHARES, dtype=torch.float32, device="cpu")
    for name in dict.fromkeys(one.readers for one in seen.values()):
        numbers = [i for i, other in enumerate(names) if seen[other].readers == name]
        total = scores[numbers].sum(0)
        if bool(total.isfinite().all()) and float(total.max()) > float(total.min()):
            ranges[numbers] = extremes[numbers[0]] * shares[int(total.argmin())]
    processes.largest(ranges)
    return {name: found for name, found in zip(names, ranges, strict=True) if bool(found.isfinite().all())}


def _scores(one: _Seen, extremes: Tensor) -> Tensor:
    """Sums the weighted squared errors that each candidate makes in one layer's output, `[C]` fp64."""
    x, layer = torch.cat(one.rows), one.layer
    scheme = layer.input_quantizer.scheme
    w = matrix_of(layer, layer.weight_quantizer(layer.weight)).to(x.dtype)
    shares = torch.linspace(*SHARES, dtype=torch.float32, device=x.device)
    grid = {"qmin": scheme.qmin, "qmax": scheme.qmax}
    scale, zero = choose_qparams(-extremes[0] * shares, extremes[1] * shares, **grid, symmetric=scheme.symmetric)
    importance = torch.cat(one.squares).sqrt()
    return score_candidates(x, scale, zero, w, x @ w.t(), importance, **grid).double().sum(1)


def _error(
    model: nn.Module,
    quantizers: Mapping[str, ActivationQuantizer],
    batches: Sequence[Inputs],
    processes: Processes,
    who: str,
) -> float:
    """Sums the squares of what rounding activations changes of the network's outputs."""
    device = next(iter(quantizers.values())).range.device
    total = torch.zeros(1, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in batches:
            with passing(quantizers.values()):
                want = _output(model, batch, who)
            total += (_output(model, batch, who).double() - want.double()).square().sum().to(device)
    processes.add(total)
    return float(total)


def _output(model: nn.Module, batch: Inputs, who: str) -> Tensor:
    output = first_tensor(run(model, batch, who))
    if output is None or not output.is_floating_point():
        got = "no tensor" if output is None else str(output.dtype)
        raise ValueError(
            f"{who}: the network must return floats where ranges are searched, got {got}; leave out ranges"
        )
    return output
