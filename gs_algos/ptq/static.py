"""Gives PTQ static activations: layers and adds are those of SimQAT, their weights are rounded to fixed grids.

Batch norms are folded first. Activations stay float while weights are found; then one pass of the network, whose
weights are rounded by then, sets their ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, split_inputs
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import get_module, swapped_class
from gs_algos.core.plan import Plan, PlanRow, rows_of
from gs_algos.fx.fold_batch_norm import fold_into
from gs_algos.fx.modularize.functional_calls import modularize_again
from gs_algos.ptq.act_ranges import search_ranges
from gs_algos.ptq.config import GRADIENT, PTQConfig
from gs_algos.ptq.layers import Task
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.transforms import network_transforms
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.fake_quant.quantizers import ActivationQuantizer, WeightQuantizer, passing
from gs_algos.quant.network.calibrate import observe
from gs_algos.quant.network.convert import swap_converted_layers
from gs_algos.quant.network.layer_plan import FORMS, LayerPlan, layer_rows
from gs_algos.quant.network.planning import LAYERS, make_plan, with_layers, with_planned_layers
from gs_algos.quant.network.prepare import QuantOptions, refuse_nonfinite, swap_layers
from gs_algos.quant.packed.grid import Grid
from gs_algos.quant.scheme import Scheme


@dataclass(frozen=True)
class StaticOptions(QuantOptions):
    """Tells what PTQ wants of `make_plan` and `swap_layers`. rounding: of every weight that no rule is on."""

    rounding: str = "gptq"

    who: ClassVar[str] = "PTQ"
    verb: ClassVar[str] = "round"

    @classmethod
    def of(cls, config: PTQConfig) -> StaticOptions:
        return cls(
            weight=str(config.weight),
            act=None if config.act is None else str(config.act),
            rules=config.rules,
            fold="none",
            fusion=True,
            act_delayed=False,
            weight_delayed=False,
            freezable=False,
            rounding=config.rounding,
        )

    def defaults(self) -> dict[str, Any]:
        return {**super().defaults(), "rounding": self.rounding}

    def layer(
        self, site: str, layer: nn.Module, bn: tuple[str, nn.Module] | None, chosen: Mapping[str, Any]
    ) -> tuple[LayerPlan, str]:
        plan, _ = super().layer(site, layer, bn, chosen)
        act = f", act {plan.act}" if plan.act else ""
        return plan, f"weight {plan.weight}, {chosen['rounding']}{act}" + (", batch norm folded" if bn else "")


class Solvable(nn.Module):
    """Gives a fake-quantized layer what the block loop asks of a `Rounded` one, while its weight is being found.

    solved: whether the weight is used as it is: it holds rounded values.
    """

    prefix = "Solvable"
    weight: Tensor
    weight_quantizer: WeightQuantizer

    @property
    def act(self) -> None:
        """Is None: activations stay float until their ranges are set."""

    @act.setter
    def act(self, value: None) -> None:
        pass

    @property
    def solved(self) -> bool:
        return not self.weight_quantizer.active

    @solved.setter
    def solved(self, value: bool) -> None:
        self.weight_quantizer.active = not value

    @property
    def float_weight(self) -> Tensor:
        return self.weight

    def seen(self, x: Tensor) -> Tensor:
        return x

    def in_shape(self, rows: Tensor) -> Tensor:
        """Returns a matrix `[N, K]` in the shape of the layer's weight."""
        return rows.view(self.weight.shape)

    @torch.no_grad()
    def set_weight(self, grid: Grid, codes: Tensor) -> None:
        """Takes codes `[N, K]` of a grid as the weight, and the grid for good."""
        self.weight.copy_(self.in_shape(grid.values(codes)))
        count = self.weight_quantizer.scale.numel()
        self.weight_quantizer.fix(grid.scale.flatten()[:count], grid.zero.flatten()[:count])
        self.solved = True


def plan_network(name: str, model: nn.Module, example_inputs: Inputs, config: PTQConfig) -> Plan:
    """Lists every layer and add, its schemes and rounding or why it stays float; touches nothing."""
    return make_plan(name, model, example_inputs, StaticOptions.of(config))


def planned_roundings(model: nn.Module, plan: Plan, example_inputs: Inputs, config: PTQConfig) -> dict[str, str]:
    """Returns how the weight of each layer of a plan is to be rounded, by site; of calls of functions, too."""
    return _roundings(with_layers(model, *split_inputs(example_inputs))[0], plan.rows, config)


def _roundings(model: nn.Module, rows: Iterable[PlanRow], config: PTQConfig) -> dict[str, str]:
    named = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    options = StaticOptions.of(config)
    chosen = resolve(config.rules, named, options.defaults(), options.who)
    return {row.site: (chosen[row.site] or {})["rounding"] for row in layer_rows(rows)}


@torch.no_grad()
def prepare(
    model: nn.Module, plan: Plan, example_inputs: Inputs, config: PTQConfig, who: str
) -> tuple[nn.Module, tuple[PlanRow, ...], dict[str, Any]]:
    """Folds batch norms, transforms and swaps layers of the live model; an error gives the values of its tensors back.

    Returns:
        The model, the rows of the plan of the folded network, and what a checkpoint must know beside them.
    """
    options = StaticOptions.of(config)
    model, new = with_planned_layers(model, plan, example_inputs)
    planned = layer_rows(plan.rows)
    folded = [(row.site, row.settings.bn, row.settings.norm_children) for row in planned if row.settings.bn]
    transforms = network_transforms(config.transforms).values()
    changed = model.modules() if transforms else (get_module(model, site) for site, _, _ in folded)
    with _values_back_on_error(changed):
        for site, bn, norm_children in folded:
            fold_into(model, site, bn, norm_children)
        for transform in transforms:
            transform.run(model, example_inputs, who)
        refuse_nonfinite(who, ((row.site, get_module(model, row.site)) for row in planned))
        rows = make_plan(plan.algorithm, model, example_inputs, options).rows
        swap_layers(model, rows, options)
        observe(who, model, activations_of(model), [example_inputs])
    return model, rows, {"modularized": new, "folded": [list(place) for place in folded]}


def folded_norms(rows: Iterable[PlanRow]) -> set[str]:
    """Returns the names of the batch norms that the rows of a plan fold."""
    return {row.settings.bn for row in rows if isinstance(row.settings, LayerPlan) and row.settings.bn}


@contextmanager
def _values_back_on_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    before = [(p, p.detach().clone()) for layer in layers for p in layer._parameters.values() if p is not None]
    try:
        yield
    except BaseException:
        for parameter, values in before:
            parameter.copy_(values)
        raise


def activations_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Returns the quantizers of activations by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


@contextmanager
def solvable_layers(model: nn.Module, rows: Sequence[PlanRow], config: PTQConfig) -> Iterator[dict[str, Task]]:
    """Yields the weights to be rounded, by site; for the duration of the block activations are float."""
    layers: dict[str, Any] = {row.site: get_module(model, row.site) for row in layer_rows(rows)}
    roundings = _roundings(model, rows, config)
    weights = [layer.weight_quantizer for layer in layers.values()]
    before = {site: type(layer) for site, layer in layers.items()}
    try:
        with passing(activations_of(model).values()):
            tasks = {}
            for row in layer_rows(rows):
                layer = layers[row.site]
                layer.__class__ = swapped_class(Solvable, type(layer))
                scheme = Scheme.parse(row.settings.weight, "weight")
                tasks[row.site] = Task(row.site, (layer,), scheme, roundings[row.site])
            yield tasks
    finally:
        for site, layer in layers.items():
            layer.__class__ = before[site]
        for quantizer in weights:
            quantizer.active = True


def set_ranges(
    model: nn.Module,
    batches: Sequence[Inputs],
    held_out: Sequence[Inputs],
    example: Inputs | None,
    config: PTQConfig,
    processes: Processes,
    who: str,
) -> None:
    """Sets the range of every activation from one pass of the network, whose weights are rounded, and searches them.

    Args:
        held_out: of the batches, those that no search sees; none if there is only one.

    Raises:
        ValueError: if a layer sees what is not finite.
    """
    quantizers = activations_of(model)
    observe(who, model, quantizers, batches, example=example, group=processes.group)
    if config.ranges == GRADIENT:
        seen = batches[: len(batches) - len(held_out)]
        search_ranges(model, quantizers, seen, held_out or seen, processes, who)


def restore(model: nn.Module, entry: dict[str, Any], config: PTQConfig) -> nn.Module:
    """Gives a freshly built float model the structure of one that was prepared or converted."""
    rows = rows_of(entry["plan"], FORMS)
    model = modularize_again(model, entry["modularized"])
    for site, bn, norm_children in entry["folded"]:
        fold_into(model, site, bn, norm_children)
    model = swap_layers(model, rows, StaticOptions.of(config))
    for row in layer_rows(rows):
        layer = get_module(model, row.site)
        assert isinstance(layer, FakeQuantized)
        layer.weight_quantizer.fixed = entry["calibrated"]
    if entry["stage"] == "converted":
        swap_converted_layers(model, rows)
    return model
