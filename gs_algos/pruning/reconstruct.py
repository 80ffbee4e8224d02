"""Refits what reads pruned channels by least squares, as AMC does (He et al. 2018, arXiv:1802.03494).

A layer that loses inputs gets the weights with which its outputs are nearest to those it has in the whole network.

Differs from the paper: all outputs of all data count, not ten points of an image; convolutions of any size, as products
of patches; what a layer sees is made by layers that are refitted already; damping; a bias is fitted along.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.input_rows import groups_of, input_rows
from gs_algos.core.input_statistics import InputStatistics
from gs_algos.core.modules import get_module
from gs_algos.core.progress import progress
from gs_algos.pruning.channel_groups.groups import Groups
from gs_algos.pruning.cut import picks_of, zeroed
from gs_algos.quant.packed.packable import base_of, is_conv1d, matrix_of

logger = logging.getLogger(__name__)

DAMP = 1e-3  # times the mean second moment of the columns that stay


@dataclass(frozen=True)
class Reader:
    """Names a layer that reads pruned channels.

    Args:
        rows, columns: bool `[N]` and `[K]`, what stays of its weight `[N, K]`.
        calls: how often a forward pass calls it.
    """

    name: str
    rows: Tensor
    columns: Tensor
    calls: int = 0


def readers_of(model: nn.Module, groups: Groups, keep: Tensor) -> list[Reader]:
    """Lists linears and convolutions that lose columns of their weight if the units in `keep` stay."""
    found = []
    for tensor, picks in picks_of(groups, keep).items():
        name, _, key = tensor.rpartition(".")
        layer: Any = get_module(model, name)
        if key != "weight" or base_of(layer) in (None, nn.Embedding):
            continue
        stays = matrix_of(layer, zeroed(torch.ones(layer.weight.shape, dtype=torch.bool), picks))
        reader = Reader(name, stays.any(1), stays.any(0))
        if not bool(reader.columns.all()):
            found.append(reader)
    return found


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    whole: nn.Module,
    groups: Groups,
    keep: Tensor,
    batches: Sequence[Inputs],
    who: str,
    add_up: Callable[[InputStatistics], None] = lambda statistics: None,
) -> None:
    """Refits the readers of a masked network in place, in the order in which a forward pass calls them.

    Args:
        whole: the same network with all its channels.
        batches: of inputs; each layer runs both networks on them up to itself.
        add_up: adds what other processes saw.

    Raises:
        ValueError: if there is no batch, or inputs do not run through the model or are not finite. Weights are then as
            they were.
    """
    if not batches:
        raise ValueError(f"{who}: at least one batch must run through the model, got none")
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with evaluating(model), evaluating(whole):
            readers = _in_order(model, readers_of(model, groups, keep), batches[0], who)
            for reader in progress(readers, "refitting layers"):
                layer: Any = get_module(model, reader.name)
                before += [(t, t.clone()) for t in (layer.weight, layer.bias) if t is not None]
                _refit(model, whole, reader, batches, who, add_up)
    except BaseException:
        for tensor, values in before:
            tensor.copy_(values)
        raise
    logger.info("%s: %d layers were refitted", who, len(readers))


def _refit(
    model: nn.Module,
    whole: nn.Module,
    reader: Reader,
    batches: Sequence[Inputs],
    who: str,
    add_up: Callable[[InputStatistics], None],
) -> None:
    layer: Any = get_module(model, reader.name)
    theirs: Any = get_module(whole, reader.name)
    weight, target, columns = matrix_of(layer, layer.weight), matrix_of(theirs, theirs.weight), reader.columns
    if layer.bias is not None:  # a column that always reads 1
        weight, target = (torch.cat([w, b.unsqueeze(1)], 1) for w, b in ((weight, layer.bias), (target, theirs.bias)))
        columns = F.pad(columns, (0, 1), value=True)
    statistics = InputStatistics(weight.shape[1], groups_of(layer), cross=True, device=weight.device)
    for batch in batches:
        pairs = zip(*(_inputs_of(net, reader, batch, who) for net in (model, whole)), strict=True)
        for x, floats in pairs:
            rows, floats = (input_rows(layer, t) for t in (x, floats))
            if layer.bias is not None:
                rows, floats = (F.pad(t, (0, 1), value=1.0) for t in (rows, floats))
            statistics.update(rows, floats)
    add_up(statistics)
    statistics.check(f"{who}: {reader.name}")
    new = least_squares(weight, target, statistics, columns)
    new[~reader.rows.to(new.device)] = 0
    if layer.bias is not None:
        layer.bias.copy_(new[:, -1])
        new = new[:, :-1]
    layer.weight.copy_((new.t() if is_conv1d(layer) else new).reshape(layer.weight.shape))


def least_squares(
    weight: Tensor, target: Tensor, statistics: InputStatistics, columns: Tensor, damp: float = DAMP
) -> Tensor:
    """Returns `W' [N, K]` with the least `|X' W'^T - X target^T|^2 + damping |W' - weight|^2`, by normal equations.

    Solved in fp64; damping grows tenfold until there is a factor.

    Args:
        weight: `[N, K]`, 0 in columns that go, where W' is 0 too.
        target: `[N, K]`. Of several groups, N / groups rows of each in turn, as in `weight`.
        statistics: of X', with the cross term of X.
        columns: bool `[K]`, that stay.
        damp: damping as a share of the mean second moment of the columns that stay.
    """
    ours, theirs = (t.double().reshape(statistics.groups, -1, t.shape[1]) for t in (weight, target))
    gram, cross = statistics.gram.double(), statistics.cross
    wanted = (theirs - ours) @ gram + (0.0 if cross is None else theirs @ cross.double())
    kept = columns.nonzero().flatten().to(gram.device)
    moments = gram.index_select(1, kept).index_select(2, kept)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += (diagonal == 0).double()  # of columns that were always 0
    mean = diagonal.mean(1, keepdim=True)
    info = torch.ones(1)
    while bool(info.any()):
        diagonal += damp * mean
        factor, info = torch.linalg.cholesky_ex(moments)
        damp *= 10
    new = ours.clone()
    new[:, :, kept] += torch.cholesky_solve(wanted.index_select(2, kept).mT, factor).mT
    return new.view(weight.shape).to(weight.dtype)


class _Seen(Exception):
    """Ends a forward pass once a layer's inputs were seen."""


def _inputs_of(model: nn.Module, reader: Reader, batch: Inputs, who: str) -> list[Tensor]:
    """Returns the input of each call of a layer, and runs the model no further."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(tensor_in((args, kwargs)))
        if len(seen) == reader.calls:
            raise _Seen

    handle = get_module(model, reader.name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Seen):
            run(model, batch, who)
    finally:
        handle.remove()
    return seen


def _in_order(model: nn.Module, readers: Sequence[Reader], batch: Inputs, who: str) -> list[Reader]:
    """Returns the readers that a forward pass calls as layers, in that order, with the number of their calls."""
    by_layer = {get_module(model, reader.name): reader for reader in readers}
    called: dict[str, Reader] = {}

    def hook(module: nn.Module, args: Any) -> None:
        reader = by_layer[module]
        called[reader.name] = replace(reader, calls=1 + (called[reader.name].calls if reader.name in called else 0))

    handles = [layer.register_forward_pre_hook(hook) for layer in by_layer]
    try:
        run(model, batch, who)
    finally:
        for handle in handles:
            handle.remove()
    return list(called.values())
