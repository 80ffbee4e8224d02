"""Trains networks that compare instead of multiplying: `y = -sum |x - w|` where a convolution has `sum x w`.

Chen et al. 2020, arXiv:1912.13200. Gradients are full-precision ones, `dW = sum (x - w) g` and
`dX = sum clamp(w - x, -1, 1) g`; each layer's weight gradient is scaled to a norm of `eta sqrt(numel)`, without which
such networks do not train. With `int8` a layer's inputs and weight share one grid, as sums of differences need (Wang et
al. 2021), so that differences of codes are differences of values. Padding zeros count.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self, Unpack

from gs_algos.adder.config import AdderConfig, AdderOptions
from gs_algos.adder.layers import AdderConv2dInt8, AdderLayer
from gs_algos.adder.planning import AdderPlan, make_plan, why_kept
from gs_algos.core.algorithm import (
    Algorithm,
    Inputs,
    asked_by,
    evaluating,
    history,
    live_entry,
    prepared_entry,
    refuse_prepared,
    resumable_entry,
    run,
)
from gs_algos.core.config import signature_of
from gs_algos.core.modules import all_or_nothing, get_module, set_module, swapped_class
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, render_layers, rows_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.untouched import untouched
from gs_algos.fx.capture.tracers import tensors_of


class Adder(Algorithm):
    """Swaps convolutions for adder layers. Options: those of `AdderConfig`, by keyword.

    ```python
    algo = Adder()
    print(algo.plan(net, example_inputs))
    net = algo.apply(net, example_inputs)
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    Parameters and their names stay. In several processes each scales its own gradient, before they are averaged, and
    ranges are those of the first, whose buffers DistributedDataParallel gives to all.
    """

    name: ClassVar[str] = "adder"
    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (AdderPlan,)
    config_class: ClassVar[type[AdderConfig]] = AdderConfig
    config: AdderConfig

    def __init__(self, config: AdderConfig | None = None, **options: Unpack[AdderOptions]) -> None:
        self.config = self.config_class.choose(config, options)
        self.steps = 0
        self._example: Inputs | None = None
        self._model: nn.Module | None = None
        self._history: dict[str, Any] = {}

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every convolution that becomes an adder layer, or why it stays; touches nothing.

        The first and the last layer stay, and grouped ones, and those behind which no norm follows.

        Raises:
            ValueError: if the inputs hold no sample or do not run through the model, or a rule matches nothing.
        """
        with ordinary_tensors(), asked_by("Adder.plan"):
            return make_plan(self.name, self.config, network_of(model, "Adder.plan"), example_inputs)

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Swaps the convolutions of the live model, whose weights then start as `start` says.

        On a grid the example inputs set the first ranges.

        Raises:
            RuntimeError: if the model is prepared by another algorithm, or was through this one.
            ValueError: as `plan`, or if no convolution can be swapped. The model is then as it was.
        """
        who = "Adder.apply"
        network = network_to_train(model, who)
        refuse_prepared(network, who)
        if any(entry["algorithm"] == self.name for entry in history(network)):
            raise RuntimeError(f"{who}: the model must have no adder layers yet, got one that has; build it anew")
        with ordinary_tensors(), asked_by(who):
            plan = make_plan(self.name, self.config, network, example_inputs)
            if not plan.acted():
                raise ValueError(f"{who}: at least one convolution must be swappable, got none:\n{plan}")
            before = {row.site: get_module(network, row.site).weight.detach().clone() for row in plan.acted()}  # type: ignore[operator, union-attr]
            try:
                with all_or_nothing(network):
                    for row in plan.acted():
                        swap(network, row)
                        start(get_module(network, row.site), self.config.start)
                    if self.config.int8:
                        self._first_ranges(network, example_inputs)
                    self._history = self.remember(network, "prepared", plan.rows)
            except BaseException:
                with torch.no_grad():
                    for site, weight in before.items():
                        get_module(network, site).weight.copy_(weight)  # type: ignore[operator, union-attr]
                raise
        self.steps, self._model, self._example = 0, network, example_inputs
        return model

    def _first_ranges(self, network: nn.Module, inputs: Inputs) -> None:
        layers = {site: m for site, m in network.named_modules() if isinstance(m, AdderLayer)}
        handles = [m.register_forward_pre_hook(lambda own, args: own.observe(args[0])) for m in layers.values()]
        try:
            with evaluating(network):
                run(network, inputs, "Adder.apply")
        finally:
            for handle in handles:
                handle.remove()
        for site, layer in layers.items():
            if not bool((layer.input_high - layer.input_low).isfinite()):
                raise ValueError(f"Adder.apply: what {site} reads must be finite, got NaN or Inf")

    def step(self) -> None:
        """Counts optimizer steps. Call it after every one.

        Raises:
            RuntimeError: if `apply` was not called.
        """
        if self._model is None:
            raise RuntimeError("Adder.step: must come between apply and convert; call apply(model, inputs) first")
        self.steps += 1
        self._history["steps"] = self.steps

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Ends the training; with `int8` each layer becomes 8-bit codes, and the outputs are compared bit for bit.

        Raises:
            RuntimeError: if the model is not prepared by this algorithm, or a converted output differs.
            ValueError: if the trained network gives what is not finite. The model is then as it was.
        """
        who = "Adder.convert"
        network = network_of(model, who)
        entry = prepared_entry(network, self.name, who)
        if self._model is None:
            raise RuntimeError(
                f"{who}: the model must be the one that the algorithm trains, got another, or it is done; "
                "use Adder.resume(model).convert(model, example_inputs)"
            )
        example = self._example if example_inputs is None else example_inputs
        if example is None:
            raise RuntimeError(f"{who}: a resumed algorithm has no example inputs; give example_inputs")
        own = network is self._model
        with ordinary_tensors(), asked_by(who), all_or_nothing(network):
            want = _outputs(network, example, who)
            if not all(bool(t.isfinite().all()) for t in want):
                raise ValueError(f"{who}: the trained network must give finite outputs, got NaN or Inf")
            rows = rows_of(entry["plan"], self.row_settings)
            for row in _adder_rows(rows):
                if row.settings.int8:
                    _convert(network, row)
            got = _outputs(network, example, who)
            if not all(torch.equal(g, w) for g, w in zip(got, want, strict=True)):
                raise RuntimeError(f"{who}: the converted network must give the trained outputs, got others")
            self.remember(network, "converted", rows, self.steps)
        if own:  # a copy may be converted while the training of the original goes on
            self._model = None
        return network

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the adder layers: weights, bytes, and what they compute with."""
        network = network_of(model, "Adder.summary")
        entry = next((e for e in reversed(history(network)) if e["algorithm"] == self.name), None)
        if entry is None:
            return f"{self.name}: not applied"
        rows = []
        for row in _adder_rows(rows_of(entry["plan"], self.row_settings)):
            layer: Any = get_module(network, row.site)
            rounded = "rounded floats" if getattr(layer, "on_grid", False) else "floats"
            how = "8-bit codes" if isinstance(layer, AdderConv2dInt8) else rounded
            nbytes = layer.weight.numel() * layer.weight.element_size()
            rows.append((row.site, f"{layer.weight.numel():,}", f"{nbytes:,}", f"{how}, -sum |x - w|"))
        return render_layers(("layer", "weights", "bytes", "computes with"), rows)

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back, at the step where it was saved.

        Raises:
            RuntimeError: if the model was not saved while prepared.
        """
        network = network_of(model, "Adder.resume")
        entry = resumable_entry(network, cls.name, "Adder")
        algo = cls(AdderConfig.from_dict(entry["config"]))
        algo._model, algo._history, algo.steps = network, live_entry(network), entry["steps"]
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        for row in _adder_rows(rows_of(entry["plan"], cls.row_settings)):
            reason = why_kept(model, row.site, get_module(model, row.site))
            if reason:
                raise ValueError(f"{row.site} must be a convolution that has an adder form; it {reason}")
            swap(model, row)
            if entry["stage"] == "converted" and row.settings.int8:
                set_module(model, row.site, AdderConv2dInt8(get_module(model, row.site)))  # type: ignore[arg-type]
        return model


def _adder_rows(rows: list[PlanRow]) -> list[PlanRow[AdderPlan]]:
    return [row for row in rows if isinstance(row.settings, AdderPlan)]


def swap(model: nn.Module, row: PlanRow[AdderPlan]) -> None:
    """Makes a live convolution an adder layer; its parameters stay."""
    layer: Any = get_module(model, row.site)
    layer.adder_eta, layer.on_grid = row.settings.eta, row.settings.int8
    if row.settings.int8:  # no input was seen: the range is empty
        layer.register_buffer("input_low", torch.full((1,), torch.inf, device=layer.weight.device))
        layer.register_buffer("input_high", torch.full((1,), -torch.inf, device=layer.weight.device))
    layer.__class__ = swapped_class(AdderLayer, type(layer))


@torch.no_grad()
def start(layer: Any, how: str) -> None:
    """Gives a layer the weights that it starts with."""
    if how == "normal":
        nn.init.normal_(layer.weight)
        return
    spread = layer.weight.float().std()
    if bool(spread > 0):
        layer.weight.div_(spread.to(layer.weight.dtype))


def _convert(model: nn.Module, row: PlanRow[AdderPlan]) -> None:
    layer: Any = get_module(model, row.site)
    codes = AdderConv2dInt8(layer)
    codes.take(layer)
    set_module(model, row.site, codes)


def _outputs(network: nn.Module, example: Inputs, who: str) -> list[torch.Tensor]:
    with untouched(network), evaluating(network):
        return [t.clone() for t in tensors_of(run(network, example, who)) if t.is_floating_point()]


Adder.__signature__ = signature_of(Adder)  # type: ignore[attr-defined]
