"""Searches for low-bit weights: SLB, Yang et al. 2020, arXiv:2009.08695.

Each weight has a logit for every level of its grid and is their softmax mixture; as the temperature falls the mixture
becomes one level, so that training ends on codes without ever rounding a gradient.

Differs from the paper: linear layers and first and last layers take part, at 1, 2, 4 or 8 bits each; the logits may
start at a trained network; scales per tensor or channel; and once the codes are chosen they are kept as codes, so that
an optimizer's momentum and weight decay on the logits can change nothing any more.

The logits are 2**bits numbers a weight (1 bit: one), and so is each state of their optimizer: at 4 bits AdamW holds 48
numbers a weight. `fused=True` with `SlbAdamW` or `SlbSGD` saves their gradient, bf16 logits (`logits="bfloat16"`) half.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from gs_algos.core.algorithm import Inputs, asked_by
from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.modules import get_module
from gs_algos.core.network import network_of, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, rows_of
from gs_algos.fx.modularize.functional_calls import modularize_again
from gs_algos.qat.slb.batch_norm import calibrate_norms
from gs_algos.qat.slb.config import SLBConfig, SLBOptions
from gs_algos.qat.slb.convert import packed_layer, unfilled_packed_layer
from gs_algos.qat.slb.layers import SearchedLayer
from gs_algos.qat.slb.optimizer_watch import LogitsWatch
from gs_algos.qat.slb.prepare import install, start
from gs_algos.qat.slb.report import draw, summary_of
from gs_algos.qat.slb.schedule import Schedule
from gs_algos.qat.slb.search import NOT_YET
from gs_algos.qat.training import QuantizationTraining
from gs_algos.quant.fake_quant.quantizers import Quantizer
from gs_algos.quant.network.convert import Parity, convert_model, swap_converted_layers
from gs_algos.quant.network.layer_plan import LayerPlan, layer_rows
from gs_algos.quant.network.planning import make_plan, with_planned_layers
from gs_algos.quant.network.prepare import refuse_nonfinite
from gs_kernels.runtime.torch_private import _BatchNorm, foreach_add_, foreach_zero_

logger = logging.getLogger(__name__)


class SLB(QuantizationTraining):
    """Trains a network while low-bit weights are searched. The options are those of `SLBConfig`, given by keyword.

    weight: `int1|int2|int4|int8@channel|tensor[:lsq]`, or `2bit@channel:learned` for `int2@channel:lsq`; `2bit` has no
    scale, which a batch norm behind each layer replaces.

    ```python
    algo = SLB(weight="2bit@channel", total_steps=epochs * len(loader))
    net = algo.apply(net, example_inputs)  # replaces each parameter `weight` by `search.logits`
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)  # so: made after apply
    for x, target in loader:
        loss_fn(net(x), target).backward(); optimizer.step(); optimizer.zero_grad(); algo.step()
    net = algo.convert(net)
    ```

    In eval mode a layer multiplies with the level of each largest logit, which is what `convert` takes. Under
    torch.compile the step at which the codes are chosen recompiles once, to a forward that reads no logits.
    After a plain `load_state_dict` set `algo.steps` to the steps that the state has seen: `step` raises RuntimeError
    where its temperature is not that of the schedule. `gs_algos.load` and `SLB.resume` do that by themselves.
    """

    name: ClassVar[str] = "slb"
    config_class: ClassVar[type[AlgorithmConfig]] = SLBConfig
    layer_class: ClassVar[type[nn.Module]] = SearchedLayer
    done: ClassVar[str] = "searched"
    config: SLBConfig
    _layers: dict[str, SearchedLayer]
    _replaced: Sequence[weakref.ref[nn.Parameter]] = ()
    _logits_watch: LogitsWatch | None = None

    def __init__(
        self,
        config: SLBConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[SLBOptions],
    ) -> None:
        super().__init__(config, process_group=process_group, **options)

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every Conv and Linear, its grid and logits, or why it stays float; touches nothing."""
        with ordinary_tensors(), asked_by("SLB.plan"):
            return make_plan(self.name, network_of(model, "SLB.plan"), example_inputs, self.config.options())

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Swaps the planned layers of the live model to searched ones; `example_inputs` start activation ranges.

        The object tree stays. Each planned layer's parameter `weight` gives way to `search.logits`, so an optimizer
        must be made afterwards; all other float keys of the state_dict stay.

        Raises:
            RuntimeError: if the model is already prepared or converted.
            ValueError: if total_steps is not set, the inputs do not run through the model, nothing can be quantized, or
                a weight or what a layer sees is not finite. The model is then as it was.
        """
        if self.config.total_steps is None:
            raise ValueError("SLB.apply: total_steps must be the optimizer steps of the whole training, got None")
        return super().apply(model, example_inputs)

    def swap_layers(self, model: nn.Module, plan: Plan, example_inputs: Inputs) -> tuple[nn.Module, dict[str, Any]]:
        config = self.config
        model, new = with_planned_layers(model, plan, example_inputs)
        layers: list[tuple[PlanRow[LayerPlan], Any]] = [
            (row, get_module(model, row.site)) for row in layer_rows(plan.rows)
        ]
        refuse_nonfinite("SLB.apply", ((row.site, layer) for row, layer in layers))
        given = [layer._parameters["weight"] for row, layer in layers if not row.settings.fused_optimizer]
        self._replaced = [weakref.ref(weight) for weight in given]
        weights = {row.site: layer.weight.detach() for row, layer in layers}
        install(model, plan.rows, config.options())
        for row, layer in layers:
            bn: Any = get_module(model, row.settings.bn) if row.settings.bn else None
            start(layer, weights[row.site].clone(), bn, 1 / config.t0, config.init, config.kappa)
        return model, {"modularized": new}

    def watch(self, model: nn.Module) -> None:
        self._logits_watch = LogitsWatch(model, list(self._layers.values()), self._replaced)
        self._replaced = ()

    def refuse_untrained(self) -> None:
        if self._logits_watch is not None:
            self._logits_watch.refuse_untrained(last=self.config.schedule().one_hot(self.steps + 1))

    def _unbind(self) -> None:
        super()._unbind()
        self._logits_watch = None

    def calibrate_norms(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        """Sets the running statistics of every batch norm to their mean over the batches, with quantized weights.

        What the authors do after each epoch, a few batches at a time, where `batch_norm="state"` is not used.

        Raises:
            RuntimeError: if `apply` was not called.
            ValueError: if there is no batch, or one does not run through the model. The statistics are then as before.
        """
        self._require_bound("calibrate_norms")
        network = network_of(model, "SLB.calibrate_norms")
        calibrate_norms("SLB.calibrate_norms", network, batches, self.process_group, self._example)

    def advance_schedule(self) -> None:
        """Sets each layer's temperature after `steps` steps, or chooses its codes. Reads nothing from the device."""
        schedule, layers = self.config.schedule(), list(self._layers.values())
        self._refuse_loaded(schedule)
        searching = [layer for layer in layers if not layer.search.one_hot]
        if schedule.one_hot(self.steps):
            for layer in searching:
                layer.search.harden()
        elif searching:
            temperatures = [layer.search.temperature for layer in searching]
            foreach_zero_(temperatures)
            foreach_add_(temperatures, schedule.temperature(self.steps))
        for layer in searching:
            layer.refresh()
        point = schedule.point(self.steps, self.config.trace)
        if point is not None:
            for layer in layers:
                layer.search.note(point)

    def _refuse_loaded(self, schedule: Schedule) -> None:
        """Raises if a layer was loaded from elsewhere in the schedule than where this run is."""
        before = self.steps - 1
        for name, layer in self._layers.items():
            loaded, due = layer.search.loaded, schedule.temperature(before)
            if loaded is not None and not math.isclose(loaded, due, rel_tol=1e-6):
                self.steps = before
                raise RuntimeError(
                    f"SLB.step: {name} must be loaded from where the schedule is, after {before} steps with temperature"
                    f" {due:.6g}, got a state_dict of temperature {loaded:.6g}; use gs_algos.save, load and SLB.resume,"
                    " or set `steps` to those that the state_dict has seen"
                )
        for layer in self._layers.values():
            layer.search.loaded = None

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Replaces every searched layer by its packed codes and scales, its batch norm by an identity; checks outputs.

        Each layer is compared with the trained one on the same input, then the whole network on `example_inputs`
        (default: those of `apply`). `self.parity` holds the largest differences. Before the codes are chosen those of
        the largest logits are taken, and a warning states how far the trained mixture is from them.

        Raises:
            RuntimeError: if the model is not prepared, is sharded, or a converted output differs from the trained one.
            ValueError: if a weight, a statistic, a range or what a layer sees is not finite.
        """
        return super().convert(model, example_inputs)

    def convert_layers(
        self, model: nn.Module, rows: list[PlanRow], example_inputs: Inputs
    ) -> tuple[Parity, list[PlanRow]]:
        searched = {name: m for name, m in model.named_modules() if isinstance(m, SearchedLayer)}
        inside = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm | Quantizer)]
        refuse_nonfinite(
            "SLB.convert", [*searched.items(), *((f"{n}.search", m.search) for n, m in searched.items()), *inside]
        )
        _warn_early(searched, self.config.schedule(), self.steps)
        return convert_model(model, rows, example_inputs, packed_layer)

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the searched or packed layers: grids, bytes, gaps, and the arithmetic each one runs in."""
        return summary_of(network_of(model, "SLB.summary"))

    def gaps(self) -> dict[str, float]:
        """Returns `||W_c - W_q|| / ||W_q||` of each layer: 0 once its codes are chosen. Reads from the device."""
        self._require_bound("gaps")
        return {name: layer.search.discretization_gap().item() for name, layer in self._layers.items()}

    def logits(self) -> list[nn.Parameter]:
        """Returns the logits of every layer that is not fused, for a parameter group of their own."""
        self._require_bound("logits")
        return [layer.search.logits for layer in self._layers.values() if not layer.fused]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Returns what is neither logits nor trained by a fused optimizer, for a parameter group of its own."""
        self._require_bound("parameters")
        searched = {
            id(p) for layer in self._layers.values() for p in (layer.search.logits, layer._parameters.get("weight"))
        }
        return [p for p in network_of(model, "SLB.parameters").parameters() if id(p) not in searched]

    def fused_layers(self) -> list[SearchedLayer]:
        """Returns the layers that `SlbAdamW` or `SlbSGD` trains."""
        self._require_bound("fused_layers")
        return [layer for layer in self._layers.values() if layer.fused]

    def traces(self) -> dict[str, Tensor]:
        """Returns each layer's `[trace, 12]` on the CPU: gap, mean confidence, and its histogram in [0, 1].

        Confidence is the largest probability of a weight. Rows that are not reached yet are NaN.
        """
        self._require_bound("traces")
        traces = {name: layer.search.trace for name, layer in self._layers.items()}
        rows = {name: trace.cpu() for name, trace in traces.items() if trace is not None}
        return {name: trace.where(trace != NOT_YET, torch.nan) for name, trace in rows.items()}

    def level_shares(self) -> dict[str, dict[float, float]]:
        """Returns for each layer which share of its weights takes each level of the grid, by the largest logits.

        Levels are those of the grid, before any scale. Where logits are sharded every rank must call it.
        """
        self._require_bound("level_shares")
        return {name: layer.search.level_shares() for name, layer in self._layers.items()}

    def picture(self, path: Any) -> None:
        """Draws the search so far, before `convert`: gaps per layer, and how the softmax becomes one-hot (matplotlib).

        Raises:
            ValueError: if `trace=0`.
        """
        draw(self.traces(), self.config.schedule(), path)

    @classmethod
    def training_options(cls, epochs: int, steps_per_epoch: int) -> dict[str, Any]:
        return {"total_steps": max(1, epochs * steps_per_epoch)}

    @classmethod
    def resume(cls, model: nn.Module, **options: Any) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back, at the step where it was saved.

        options: what you believe it was made with; a difference is an error.

        Raises:
            RuntimeError: if the model was not saved while prepared.
            ValueError: if an option differs from the saved one.
        """
        algo = super().resume(model)
        given = replace(algo.config, **options)
        for name, value in options.items():
            began = getattr(algo.config, name)
            if began != getattr(given, name):
                raise ValueError(f"SLB.resume: {name} must be {began!r}, as the search began, got {value!r}")
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        rows = rows_of(entry["plan"], cls.row_settings)
        model = modularize_again(model, entry.get("modularized", []))
        model = install(model, rows, SLBConfig.from_dict(entry["config"]).options())
        if entry["stage"] == "converted":
            swap_converted_layers(model, rows, unfilled_packed_layer)
        return model


def _warn_early(layers: Mapping[str, SearchedLayer], schedule: Schedule, steps: int) -> None:
    """Warns how far mixtures are from the codes that `convert` takes, if those are not chosen yet."""
    searching = {name: layer.search for name, layer in layers.items() if not layer.search.one_hot}
    gaps = {name: search.discretization_gap().item() for name, search in searching.items()}
    if gaps:
        worst = max(gaps, key=lambda name: gaps[name])
        logger.warning(
            "SLB.convert: the codes of %d of %d layers are not chosen before step %d, got step %d: their weights jump "
            "by %.1f %% on average and by %.1f %% in %s; train on, or expect other outputs than in training",
            *(len(gaps), len(layers), schedule.one_hot_step, steps),
            *(100 * sum(gaps.values()) / len(gaps), 100 * gaps[worst], worst),
        )
