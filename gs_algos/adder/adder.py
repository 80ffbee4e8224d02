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
from typing_extensions import Unpack

from gs_algos.adder.config import AdderConfig, AdderOptions
from gs_algos.adder.layers import AdderConv2dInt8, AdderLayer
from gs_algos.adder.planning import AdderPlan, make_plan, why_kept
from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.modules import get_module, set_module, swapped_class
from gs_algos.core.network import network_of
from gs_algos.core.plan import Plan, PlanRow, render_layers, rows_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.training import LayerReplacement
from gs_algos.quant.integer.recorded_forward import record_forwards


class Adder(LayerReplacement):
    """Swaps convolutions for adder layers. Options: those of `AdderConfig`, by keyword.

    ```python
    algo = Adder()
    print(algo.plan(net, example_inputs))
    net = algo.apply(net, example_inputs)
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```
    The weights of the live model then start as `start` says; on a grid the example inputs set the first ranges. The
    first layer and the last stay convolutions, and grouped ones, and those behind which no norm follows. `convert`
    makes 8-bit codes of layers on a grid, bit for bit. Parameters and their names stay. In several processes each
    scales its own gradient, before they are averaged, and ranges are those of the first, whose buffers
    DistributedDataParallel gives to all.
    """

    name: ClassVar[str] = "adder"
    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (AdderPlan,)
    config_class: ClassVar[type[AdderConfig]] = AdderConfig
    layers: ClassVar[str] = "adder layers"
    possible: ClassVar[str] = "swappable"
    config: AdderConfig

    def __init__(self, config: AdderConfig | None = None, **options: Unpack[AdderOptions]) -> None:
        super().__init__(config, **options)

    def planned(self, network: nn.Module, example_inputs: Inputs) -> tuple[Plan, None]:
        return make_plan(self.name, self.config, network, example_inputs), None

    def put_in(self, network: nn.Module, plan: Plan, made: None, example_inputs: Inputs) -> None:
        before = {row.site: get_module(network, row.site).weight.detach().clone() for row in plan.acted()}  # type: ignore[operator, union-attr]
        try:
            for row in plan.acted():
                swap(network, row)
                start(get_module(network, row.site), self.config.start)
            if self.config.int8:
                self._first_ranges(network, example_inputs)
        except BaseException:
            with torch.no_grad():
                for site, weight in before.items():
                    get_module(network, site).weight.copy_(weight)  # type: ignore[operator, union-attr]
            raise

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

    def convert_layers(self, network: nn.Module, rows: list[PlanRow[AdderPlan]]) -> bool:
        rows = [row for row in rows if row.settings.int8]
        for row in rows:
            _convert(network, row)
        if rows:
            record_forwards(network)
        return bool(rows)

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the adder layers: weights, bytes, and what they compute with."""
        network = network_of(model, "Adder.summary")
        entry = self.entry_of(network)
        if entry is None:
            return f"{self.name}: not applied"
        rows = []
        for row in self.own(rows_of(entry["plan"], self.row_settings)):
            layer: Any = get_module(network, row.site)
            rounded = "rounded floats" if getattr(layer, "on_grid", False) else "floats"
            how = "8-bit codes" if isinstance(layer, AdderConv2dInt8) else rounded
            nbytes = layer.weight.numel() * layer.weight.element_size()
            rows.append((row.site, f"{layer.weight.numel():,}", f"{nbytes:,}", f"{how}, -sum |x - w|"))
        return render_layers(("layer", "weights", "bytes", "computes with"), rows)

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        for row in cls.own(rows_of(entry["plan"], cls.row_settings)):
            reason = why_kept(model, row.site, get_module(model, row.site))
            if reason:
                raise ValueError(f"{row.site} must be a convolution that has an adder form; it {reason}")
            swap(model, row)
            if entry["stage"] == "converted" and row.settings.int8:
                set_module(model, row.site, AdderConv2dInt8(get_module(model, row.site)))  # type: ignore[arg-type]
                record_forwards(model)
        return model


def swap(model: nn.Module, row: PlanRow[AdderPlan]) -> None:
    """Makes a live convolution an adder layer; its parameters stay."""
    layer: Any = get_module(model, row.site)
    layer.adder_site, layer.adder_eta, layer.on_grid = row.site, row.settings.eta, row.settings.int8
    if row.settings.int8:  # no input was seen: the range is empty
        layer.register_buffer("input_low", torch.full((1,), torch.inf, dtype=torch.float32, device=layer.weight.device))
        layer.register_buffer(
            "input_high", torch.full((1,), -torch.inf, dtype=torch.float32, device=layer.weight.device)
        )
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
