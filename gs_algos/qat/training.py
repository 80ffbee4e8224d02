"""Holds what SimQAT and SLB share, which train a network against its own quantization: everything but their layers."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from gs_algos.core.algorithm import (
    Inputs,
    Migration,
    asked_by,
    history,
    remember,
)
from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.modules import all_or_nothing
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, rows_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.training import TrainingAlgorithm
from gs_algos.qat.optimizer_watch import TrainingWatch
from gs_algos.quant.fake_quant.quantizers import SMALLEST_SCALE, ActivationQuantizer, Quantizer, update_ranges
from gs_algos.quant.network.calibrate import observe
from gs_algos.quant.network.convert import Parity
from gs_algos.quant.network.layer_plan import FORMS, from_version_1
from gs_algos.quant.network.prepare import refuse_nonfinite

logger = logging.getLogger(__name__)


class QuantizationTraining(TrainingAlgorithm):
    """Trains a network to be quantized. A subclass says what its layers are, how they are swapped in and converted.

    parity: how far the last converted network was from the trained one.
    """

    row_settings: ClassVar[tuple[type[RowSettings], ...]] = FORMS
    migrations: ClassVar[Mapping[int, Migration]] = {1: from_version_1}
    config_class: ClassVar[type[AlgorithmConfig]]
    layer_class: ClassVar[type[nn.Module]]
    done: ClassVar[str]  # what a model that has been through `apply` is, e.g. "quantized"

    def __init__(
        self, config: AlgorithmConfig | None = None, *, process_group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self.who = self.config_class.who
        self.steps = 0
        self.parity: Parity | None = None
        self.process_group = process_group
        self._watch: TrainingWatch | None = None
        self._layers: dict[str, Any] = {}
        self._quantizers: dict[str, Quantizer] = {}

    @abstractmethod
    def swap_layers(self, model: nn.Module, plan: Plan, example_inputs: Inputs) -> tuple[nn.Module, dict[str, Any]]:
        """Swaps the planned layers of a live model; returns it and what a checkpoint must know beside the plan."""

    @abstractmethod
    def advance_schedule(self) -> None:
        """Sets what follows a schedule to its value after `steps` steps. Nothing is read back from the device."""

    @abstractmethod
    def convert_layers(
        self, model: nn.Module, rows: list[PlanRow], example_inputs: Inputs
    ) -> tuple[Parity, list[PlanRow]]:
        """Replaces the trained layers and compares outputs; returns the differences and the rows of the new network."""

    def after_calibration(self) -> None:
        """Sets what follows from calibrated activation ranges."""

    def watch(self, model: nn.Module) -> None:
        """Begins to watch whether an optimizer trains what `apply` added."""

    def refuse_untrained(self) -> None:
        """Raises RuntimeError if the parameters that `apply` added stand still while the network trains."""

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        network = network_to_train(model, f"{self.who}.apply")
        with ordinary_tensors(), asked_by(f"{self.who}.apply"):
            prepared = self._apply(network, example_inputs)
        return model if prepared is network else prepared

    def _apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        if any(entry["algorithm"] == self.name for entry in history(model)):
            stage = history(model)[-1]["stage"]
            raise RuntimeError(
                f"{self.who}.apply: the model must not be {self.done} yet, got one that is {stage}; build it anew"
            )
        if self._layers:
            logger.warning("%s.apply: steps are for this model now, no more for the one before", self.who)
        plan = self.plan(model, example_inputs)
        if not plan.acted():
            raise ValueError(f"{self.who}.apply: at least one layer must be quantizable, got none:\n{plan}")
        try:
            with all_or_nothing(model):
                model, checkpoint_facts = self.swap_layers(model, plan, example_inputs)
                self.steps = 0
                self._bind(model)
                self._example = example_inputs
                if self._activations():
                    self._observe("apply", model, [example_inputs], provisional=True)
                entry = {
                    "algorithm": self.name,
                    "stage": "prepared",
                    "steps": 0,
                    "config": self.config.to_dict(),
                    "plan": [row.to_dict() for row in plan.rows],
                    **checkpoint_facts,
                }
                self._history = remember(model, entry)
                self.advance_schedule()
                self.watch(model)
        except BaseException:
            self._unbind()
            raise
        return model

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Sets every activation range from data before training: `batches` of inputs, or your own `forward_loop`.

        Of batches such as `(x, y)` the part is taken that has the form of the example inputs, which the log says once.

        Raises:
            TypeError: if the batches are no iterable, or the loop is no function.
            RuntimeError: if `apply` was not called on this model.
            ValueError: if not exactly one of the two is given, it shows the model nothing, or a weight or an activation
                is not finite. The ranges are then as they were.
        """
        self._require_bound("calibrate")
        if (batches is None) == (forward_loop is None):
            raise ValueError(f"{self.who}.calibrate: give either batches or forward_loop")
        if not self._activations():
            logger.warning("%s.calibrate: activations stay float, so no range of theirs is set", self.who)
        network = network_of(model, f"{self.who}.calibrate")
        refuse_nonfinite(f"{self.who}.calibrate", self._layers.items())
        with ordinary_tensors():
            self._observe("calibrate", network, batches, forward_loop)
            self.after_calibration()
        if self._watch is not None:
            self._watch.start()

    def step(self) -> None:
        """Updates ranges and advances schedules. Call it after every optimizer step, on every rank.

        Raises:
            RuntimeError: if `apply` was not called, or no optimizer trains what it added.
        """
        self._require_bound("step")
        self.refuse_untrained()
        self.steps += 1
        update_ranges(list(self._activations().values()), self.process_group)
        for quantizer in self._quantizers.values():
            if quantizer.scheme.learned:
                quantizer.scale.data.clamp_(min=SMALLEST_SCALE)
        self.advance_schedule()
        self._history["steps"] = self.steps

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        model, entry, example = self.to_convert(model, example_inputs, f"{self.who}.convert")
        for name, layer in model.named_modules():
            if isinstance(layer, self.layer_class) and any(p.dtype == torch.float64 for p in layer.parameters()):
                raise ValueError(
                    f"{self.who}.convert: layers must be in float32, float16 or bfloat16, got {name} in float64; "
                    "call net.float() first"
                )
        own = not set(self._layers.values()).isdisjoint(model.modules())
        rows = rows_of(entry["plan"], self.row_settings)
        with ordinary_tensors(), asked_by(f"{self.who}.convert"), all_or_nothing(model):
            self.parity, rows = self.convert_layers(model, rows, example)
            plan = [row.to_dict() for row in rows]
            remember(model, {**entry, "stage": "converted", "steps": self.steps, "plan": plan})
        if own:  # a copy may be converted while the training of the original goes on
            self._unbind()
        return model

    def bind_again(self, model: nn.Module, entry: dict[str, Any]) -> None:
        self._bind(model)

    def _observe(self, method: str, model: nn.Module, *data: Any, provisional: bool = False) -> None:
        who = f"{self.who}.{method}"
        options: dict[str, Any] = {"example": self._example, "provisional": provisional, "group": self.process_group}
        observe(who, model, self._activations(), *data, **options)

    def _bind(self, model: nn.Module) -> None:
        """Remembers the live layers and quantizers that `step` has to visit."""
        self._model = model
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, self.layer_class)}
        self._quantizers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}

    def _unbind(self) -> None:
        self._model, self._layers, self._quantizers, self._watch = None, {}, {}, None

    def _activations(self) -> dict[str, ActivationQuantizer]:
        return {n: q for n, q in self._quantizers.items() if isinstance(q, ActivationQuantizer)}
