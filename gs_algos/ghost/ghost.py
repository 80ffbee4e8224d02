"""Replaces convolutions by ghost layers: a part of the channels is computed, cheap depthwise filters make the others.

Han et al. 2020, arXiv:1911.11907. Trained networks hold pairs of feature maps of which one is nearly a filtered copy of
the other. Differs from the paper, which trains such networks from random weights: the channels that are computed are
those from which the others follow best, and the filters start at their least squares, so that a trained network stays
near to what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn
from typing_extensions import Unpack

from gs_algos.core.algorithm import Inputs, asked_by, evaluating, run
from gs_algos.core.batches import InputsOf, checked_batches, refuse_empty
from gs_algos.core.modules import get_module, set_module
from gs_algos.core.network import network_of, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, render_layers, rows_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.progress import progress
from gs_algos.core.training import LayerReplacement
from gs_algos.core.untouched import untouched
from gs_algos.ghost.config import GhostConfig, GhostOptions
from gs_algos.ghost.fit import Moments, OutputWatch, error_of, fitted, moments_of_filters, write
from gs_algos.ghost.layers import GhostConv2d, can_split
from gs_algos.ghost.planning import GhostPlan, make_plan, put_in, why_kept

logger = logging.getLogger(__name__)


class Ghost(LayerReplacement):
    """Replaces convolutions by ghost layers. Options: those of `GhostConfig`, by keyword.

    ```python
    algo = Ghost(ratio=2)
    print(algo.plan(net, example_inputs))  # multiply-adds, bytes, ms and error of each layer, before and after
    net = algo.apply(net, example_inputs)
    algo.calibrate(net, batches)  # if there are data: refits layers where that is better on some of them
    ...; algo.step()
    net = algo.convert(net)
    ```
    `plan` times layers, before and after in turns; a slower one stays unless `force`. The layers are in place from
    `apply` on, with new parameters, for an optimizer that is made after it, and `convert` only ends the training. A
    batch norm right behind a replaced convolution becomes two in the ghost layer, and an identity in its place. What
    comes next, such as SimQAT, sees plain convolutions and batch norms.

    errors: layer -> (error of the fit of its filters, error of the fit of its outputs) on the last quarter of the
        batches that `calibrate` was given, as shares of the outputs' variance. The lower one is taken.
    """

    name: ClassVar[str] = "ghost"
    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (GhostPlan,)
    config_class: ClassVar[type[GhostConfig]] = GhostConfig
    layers: ClassVar[str] = "ghost layers"
    possible: ClassVar[str] = "replaceable"
    config: GhostConfig

    def __init__(self, config: GhostConfig | None = None, **options: Unpack[GhostOptions]) -> None:
        super().__init__(config, **options)
        self.errors: dict[str, tuple[float, float]] = {}
        self._replaced: dict[str, tuple[nn.Conv2d, str | None, Any]] = {}  # layer -> it, its norm by name, its norm

    def planned(self, network: nn.Module, example_inputs: Inputs) -> tuple[Plan, dict[str, GhostConv2d]]:
        return make_plan(self.name, self.config, network, example_inputs)

    def put_in(self, network: nn.Module, plan: Plan, made: dict[str, GhostConv2d], example_inputs: Inputs) -> None:
        replaced: dict[str, Any] = {}
        for row in plan.acted():
            norm = row.settings.norm
            bn = None if norm is None else get_module(network, norm)
            replaced[row.site] = (get_module(network, row.site), norm, bn)
            put_in(network, row.site, made[row.site], norm)
        self.errors, self._replaced = {}, replaced if self.config.fit else {}

    @property
    def calibrate_first(self) -> bool:
        return bool(self._replaced) and not self.errors

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Fits every layer to the outputs that the replaced one has on data, and takes that fit where it is better.

        Three of four batches are fitted to; on the others both fits are measured. Of one batch, all of it is both. Call
        it between `apply` and the first `step`, before any training.

        Args:
            batches: of inputs; `(x, y)` counts as x.
            forward_loop: runs the model on inputs of its own, instead.

        Raises:
            RuntimeError: if `apply` was not called on this model, a step was taken, or there is no fit.
            TypeError: if the batches are no iterable.
            ValueError: if not exactly one of the two is given, no batch runs through the model, or what a layer gives
                is not finite. The layers are then as they were.
        """
        who = "Ghost.calibrate"
        network = network_of(model, who)
        if self._require_bound("calibrate") is not network:
            raise RuntimeError(f"{who}: the model must be the one that the algorithm trains, got another")
        if not self._replaced:
            why = "fit=False" if not self.config.fit else "a step, or a resumed algorithm"
            raise RuntimeError(f"{who}: the layers that were replaced must be kept, got {why}; call it after apply")
        if (batches is None) == (forward_loop is None):
            raise ValueError(f"{who}: give either batches or forward_loop")
        with ordinary_tensors(), asked_by(who):
            seen = self._moments(network, batches, forward_loop)
            for row in self._rows(network):
                conv, _, norm = self._replaced[row.site]
                layer = cast(GhostConv2d, get_module(network, row.site))
                known, held_out = seen[row.site]
                of_filters = moments_of_filters(conv, norm, row.settings.kernel)
                fits = fitted(of_filters, row.settings.ratio), fitted(known, row.settings.ratio)
                errors = error_of(fits[0], held_out), error_of(fits[1], held_out)
                write(layer, conv, norm, fits[errors[1] < errors[0]], known)
                self.errors[row.site] = errors
                logger.info("%s: error %.4f by filters, %.4f by outputs", row.site, *errors)
        self._history["errors"] = {site: list(errors) for site, errors in self.errors.items()}

    def _moments(
        self, network: nn.Module, batches: Iterable[Inputs] | None, forward_loop: Callable[[nn.Module], None] | None
    ) -> dict[str, tuple[Moments, Moments]]:
        """Runs the network with the replaced layers back in place; returns moments to fit to, and to measure on."""
        who = "Ghost.calibrate"
        rows = self._rows(network)
        sizes = {row.site: (self._replaced[row.site][0].out_channels, row.settings.kernel) for row in rows}
        inputs_of = InputsOf(who, network, self._example)
        with ExitStack() as stack, untouched(network), evaluating(network):
            for row in rows:
                conv, norm, bn = self._replaced[row.site]
                for name, module in ((row.site, conv), (norm, bn)):
                    if name is not None:
                        stack.callback(set_module, network, name, get_module(network, name))
                        set_module(network, name, module)
            watch = OutputWatch({s: bn or conv for s, (conv, _, bn) in self._replaced.items()}, sizes, who)
            stack.callback(watch.remove)
            if forward_loop is not None:
                forward_loop(network)
            for batch in progress(checked_batches(who, () if batches is None else batches), "fitting ghosts"):
                inputs = inputs_of(batch)
                refuse_empty(inputs, who)
                run(network, inputs, who)
        return watch.moments()

    def step(self) -> None:
        super().step()
        self._replaced = {}

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        network = super().convert(model, example_inputs)
        if self._model is None:
            self._replaced = {}
        return network

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the ghost layers: channels computed, parameters before and after, error of the fit."""
        network = network_of(model, "Ghost.summary")
        errors: dict[str, list[float]] = (self.entry_of(network) or {}).get("errors", {})
        rows = []
        for row in self._rows(network):
            layer = cast(GhostConv2d, get_module(network, row.site))
            made = layer.primary.weight[0].numel()
            numbers = layer.primary.weight.numel() + layer.cheap.weight.numel()
            error = "" if row.settings.error is None else f"{100 * row.settings.error:.1f} %"
            measured = " / ".join(f"{100 * one:.1f} %" for one in errors.get(row.site, ()))
            channels = f"{layer.primary.out_channels} of {layer.out_channels}"
            rows.append((row.site, channels, f"{made * layer.out_channels:,}", f"{numbers:,}", error, measured))
        if not rows:
            return f"{self.name}: not applied"
        header = ("layer", "computed", "weights before", "weights", "error", "on data: filters / outputs")
        return render_layers(header, rows)

    def bind_again(self, model: nn.Module, entry: dict[str, Any]) -> None:
        super().bind_again(model, entry)
        self.errors = {site: (found[0], found[1]) for site, found in entry.get("errors", {}).items()}
        if self.config.fit and not entry["steps"] and not self.errors:
            logger.warning("Ghost.resume: ghosts are fitted to filters alone: a checkpoint has no replaced layers")

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        for row in cls.own(rows_of(entry["plan"], cls.row_settings)):
            _restore(model, row)
        return model

    def _rows(self, network: nn.Module) -> list[PlanRow[GhostPlan]]:
        entry = self.entry_of(network)
        return [] if entry is None else self.own(rows_of(entry["plan"], self.row_settings))


def _restore(model: nn.Module, row: PlanRow[GhostPlan]) -> None:
    """Puts the ghost layer of a row into a freshly built model.

    Raises:
        ValueError: if the model has no such convolution.
    """
    plan, conv = row.settings, get_module(model, row.site)
    replace(GhostConfig(), ratio=plan.ratio, kernel=plan.kernel)  # checks them
    reason = why_kept(model, row.site, conv, {"ratio": plan.ratio})
    norm = None if plan.norm is None else get_module(model, plan.norm)
    if reason or (norm is not None and not can_split(norm)):
        raise ValueError(f"{row.site} must be a convolution that can have ghosts; it {reason or 'has another norm'}")
    with torch.random.fork_rng(devices=[]):
        layer = GhostConv2d(cast(nn.Conv2d, conv), norm, plan.ratio, plan.kernel, plan.ordered)
    put_in(model, row.site, layer, plan.norm)
