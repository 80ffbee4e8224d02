"""Holds what algorithms that train a live model share: which model that is, resuming, what `convert` asks for first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

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
from gs_algos.core.batches import refuse_empty
from gs_algos.core.config import AlgorithmConfig, signature_of
from gs_algos.core.modules import all_or_nothing
from gs_algos.core.nested_tensors import tensors_of
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors
from gs_algos.core.plan import Plan, PlanRow, rows_of
from gs_algos.core.untouched import untouched

ALWAYS = ("algorithm", "stage", "steps", "config", "plan")  # in every history entry


class TrainingAlgorithm(Algorithm):
    """Knows the live model that it trains, between `apply` or `resume`, and `convert`."""

    config_class: ClassVar[type[AlgorithmConfig]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    def __init__(self, config: AlgorithmConfig | None = None, **options: Any) -> None:
        self.config = self.config_class.choose(config, options)
        self._model: nn.Module | None = None
        self._example: Inputs | None = None
        self._history: dict[str, Any] = {}  # the live entry, in which steps are counted

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back, at the step where it was saved.

        Raises:
            RuntimeError: if the model was not saved while prepared.
        """
        who = cls.config_class.who
        network = network_of(model, f"{who}.resume")
        entry = resumable_entry(network, cls.name, who)
        algo = cls(cls.config_class.from_dict(entry["config"]))
        algo._history = live_entry(network)
        algo.bind_again(network, entry)
        algo.steps = entry["steps"]
        return algo

    def bind_again(self, model: nn.Module, entry: dict[str, Any]) -> None:
        """Remembers a model that `load` gave back, from the entry of its history."""
        self._model = model

    def _require_bound(self, method: str) -> nn.Module:
        """Returns the model that is trained.

        Raises:
            RuntimeError: if there is none.
        """
        if self._model is None:
            who = self.config_class.who
            raise RuntimeError(f"{who}.{method}: must come between apply and convert; call apply(model, inputs) first")
        return self._model

    def to_convert(
        self, model: nn.Module, example_inputs: Inputs | None, who: str
    ) -> tuple[nn.Module, dict[str, Any], Inputs]:
        """Returns the network in a model that is converted, a copy of its history's entry, and example inputs.

        Raises:
            RuntimeError: if this algorithm does not train a model, or not such a one, or has no example inputs.
        """
        network = network_of(model, who)
        entry = prepared_entry(network, self.name, who)
        if self._model is None:
            raise RuntimeError(
                f"{who}: the model must be the one that the algorithm trains, got another, or it is done; "
                f"use {self.config_class.who}.resume(model).convert(model, example_inputs)"
            )
        example = self._example if example_inputs is None else example_inputs
        if example is None:
            raise RuntimeError(f"{who}: a resumed algorithm has no example inputs; give example_inputs")
        return network, entry, example


class LayerReplacement(TrainingAlgorithm):
    """Puts other layers in place of some at `apply`, trains them as they are, and converts them or leaves them.

    A subclass plans, puts its layers in, and says what `convert` makes of them.

    layers: what it puts in, e.g. "ghost layers".
    possible: what a convolution is that it replaces, e.g. "replaceable".
    """

    layers: ClassVar[str]
    possible: ClassVar[str]

    def __init__(self, config: AlgorithmConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.steps = 0

    @abstractmethod
    def planned(self, network: nn.Module, example_inputs: Inputs) -> tuple[Plan, Any]:
        """Returns the plan, and what was made for it that `put_in` needs. Touches nothing."""

    @abstractmethod
    def put_in(self, network: nn.Module, plan: Plan, made: Any, example_inputs: Inputs) -> None:
        """Puts the planned layers into the live network; modules and their members are put back if it raises."""

    def convert_layers(self, network: nn.Module, rows: list[PlanRow[Any]]) -> bool:
        """Converts the trained layers; returns whether any changed, so that outputs must be compared."""
        return False

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every convolution, what comes in its place, or why it stays; touches nothing.

        Raises:
            ValueError: if the inputs hold no sample or do not run through the model, or a rule matches nothing.
        """
        who = f"{self.config.who}.plan"
        with ordinary_tensors(), asked_by(who):
            return self.planned(network_of(model, who), example_inputs)[0]

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Puts the layers into the live model and returns it.

        Raises:
            RuntimeError: if the model is prepared by another algorithm, or was through this one.
            ValueError: as `plan`, or if no convolution can be replaced. The model is then as it was.
        """
        who = f"{self.config.who}.apply"
        network = network_to_train(model, who)
        refuse_prepared(network, who)
        if any(entry["algorithm"] == self.name for entry in history(network)):
            raise RuntimeError(f"{who}: the model must have no {self.layers} yet, got one that has; build it anew")
        with ordinary_tensors(), asked_by(who):
            plan, made = self.planned(network, example_inputs)
            if not plan.acted():
                raise ValueError(f"{who}: at least one convolution must be {self.possible}, got none:\n{plan}")
            with all_or_nothing(network):
                self.put_in(network, plan, made, example_inputs)
                self._history = self.remember(network, "prepared", plan.rows)
        self.steps, self._model, self._example = 0, network, example_inputs
        return model

    def step(self) -> None:
        """Counts optimizer steps. Call it after every one.

        Raises:
            RuntimeError: if `apply` was not called.
        """
        self._require_bound("step")
        self.steps += 1
        self._history["steps"] = self.steps

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Ends the training. Where layers are converted, outputs are compared with the trained ones, bit for bit.

        Raises:
            RuntimeError: if the model is not prepared by this algorithm, or a converted output differs.
            ValueError: if the trained network gives what is not finite. The model is then as it was.
        """
        who = f"{self.config.who}.convert"
        network, entry, example = self.to_convert(model, example_inputs, who)
        with ordinary_tensors(), asked_by(who), all_or_nothing(network):
            want = _outputs(network, example, who)
            if not all(bool(t.isfinite().all()) for t in want):
                raise ValueError(f"{who}: the trained network must give finite outputs, got NaN or Inf")
            rows = rows_of(entry["plan"], self.row_settings)
            if self.convert_layers(network, self.own(rows)):
                got = _outputs(network, example, who)
                if not all(torch.equal(g, w) for g, w in zip(got, want, strict=True)):
                    raise RuntimeError(f"{who}: the converted network must give the trained outputs, got others")
            facts = {key: value for key, value in entry.items() if key not in ALWAYS}
            self.remember(network, "converted", rows, self.steps, **facts)
        if network is self._model:  # a copy may be converted while the training of the original goes on
            self._model = None
        return network

    @classmethod
    def own(cls, rows: list[PlanRow[Any]]) -> list[PlanRow[Any]]:
        """Returns the rows of the layers that were put in."""
        return [row for row in rows if isinstance(row.settings, cls.row_settings)]

    def entry_of(self, network: nn.Module) -> dict[str, Any] | None:
        """Returns the newest entry of this algorithm in a network's history; None if it was not applied."""
        return next((entry for entry in reversed(history(network)) if entry["algorithm"] == self.name), None)


def _outputs(network: nn.Module, example: Inputs, who: str) -> list[Tensor]:
    refuse_empty(example, who)
    with untouched(network), evaluating(network):
        return [t.clone() for t in tensors_of(run(network, example, who)) if t.is_floating_point()]
