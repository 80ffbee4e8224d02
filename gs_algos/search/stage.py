"""Searches as an algorithm: `apply` searches first, and then the inner algorithm does all the rest with what was found.

What is left in the network, its history and its checkpoints is the inner algorithm's alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn
from typing_extensions import Self, Unpack

from gs_algos.analysis.latency_table import LatencyTable
from gs_algos.core.algorithm import Algorithm, Inputs, Loss, history
from gs_algos.core.config import signature_of
from gs_algos.core.plan import Plan
from gs_algos.core.registry import algorithm_class
from gs_algos.distill.distill import Distill
from gs_algos.qat.simqat import SimQAT
from gs_algos.search.config import SearchConfig, SearchOptions
from gs_algos.search.driver import OnStep
from gs_algos.search.evaluate import Evaluate
from gs_algos.search.policy import Policy, with_rules
from gs_algos.search.search import search_rules
from gs_algos.search.tuned import Tune


class Search(Algorithm):
    """Finds the rules of another algorithm when it is applied. Options: those of `SearchConfig`, by keyword.

    ```python
    algo = Search(SimQAT(act="int8@tensor:ema"), data=batches, budget="3 bits")
    net = algo.apply(net, example_inputs)  # searches, then prepares the network with what was found
    print(algo.policy)
    ...; algo.step()  # and so on: as with the inner algorithm, whose own methods and results are there too
    net = algo.convert(net)
    ```

    inner: the algorithm, with the rules that were found once it is applied.
    policy: what was found; None before.

    Args:
        inner: what compresses the network; default: `SimQAT()`.
        data, evaluate, tune, latency, journal, process_group, on_step: as of `search_rules`.
    """

    name: ClassVar[str] = "search"
    config_class: ClassVar[type[SearchConfig]] = SearchConfig
    config: SearchConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    def __init__(
        self,
        inner: Algorithm | None = None,
        config: SearchConfig | None = None,
        *,
        data: Iterable[Any] | None = None,
        evaluate: Evaluate | None = None,
        tune: Tune | None = None,
        latency: LatencyTable | str | os.PathLike[str] | None = None,
        journal: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_step: OnStep | None = None,
        **options: Unpack[SearchOptions],
    ) -> None:
        self.config = self.config_class.choose(config, dict(options))
        given = self.usual() if inner is None else inner
        if not isinstance(given, Algorithm):
            raise TypeError(f"{self.config.who}: inner must be an algorithm such as SimQAT(), got {given!r:.60}")
        if isinstance(given, Search):
            raise TypeError(f"{self.config.who}: inner must be what compresses a network, got another search")
        if isinstance(given, Distill):
            own = "" if given.inner is None else type(given.inner).__name__
            raise TypeError(
                f"{self.config.who}: inner must be what compresses a network, got Distill({own}); distill outside, as "
                f"in Distill({type(self).__name__}({own or 'SimQAT'}(), data=batches))"
            )
        self.given = self.inner = given
        self.data, self.evaluate, self.tune = data, evaluate, tune
        self.latency, self.journal = latency, journal
        self.process_group, self.on_step = process_group, on_step
        self.policy: Policy | None = None

    @classmethod
    def usual(cls) -> Algorithm:
        """Returns the algorithm that is searched for if none is given."""
        return SimQAT()

    def __getattr__(self, name: str) -> Any:
        """Gives what only the inner algorithm has."""
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self.inner.trains

    @property
    def calibrate_first(self) -> bool:
        return self.inner.calibrate_first

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.inner.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.inner.steps = value

    def active(self) -> Algorithm:
        return self.inner.active()

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists what the inner algorithm would do without the rules that a search would find; touches nothing."""
        plan = self.inner.plan(model, example_inputs)
        if self.policy is not None:
            return plan
        note = f"what has a choice will be searched by {self.config.agent}, for {self.config.budget}"
        return replace(plan, notes=(*plan.notes, note))

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Searches on a private copy, and prepares the live model by the inner algorithm with the rules found.

        Raises:
            ValueError: as `search_rules`, or if there is no data. The model is then as it was.
        """
        if self.data is None:
            raise ValueError(
                f"{self.config.who}.apply: data must be batches of training inputs, got none; set {type(self).__name__}"
                "(data=batches)"
            )
        policy = search_rules(
            model,
            example_inputs,
            self.given,
            self.data,
            self.config,
            evaluate=self.evaluate,
            tune=self.tune,
            latency=self.latency,
            journal=self.journal,
            process_group=self.process_group,
            on_step=self.on_step,
        )
        inner = with_rules(self.given, policy.rules[0])
        prepared = inner.apply(model, example_inputs)
        self.inner, self.policy = inner, policy
        return prepared

    def step(self) -> None:
        self.inner.step()

    def loss(self, fn: Loss) -> Loss:
        return self.inner.loss(fn)

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        return self.inner.convert(model, example_inputs)

    def summary(self, model: nn.Module) -> str:
        return self.inner.summary(model)

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        """Resumes the inner algorithm of a prepared model, whose rules are those that were found."""
        entries = history(model)
        name = entries[-1]["algorithm"] if entries else SimQAT.name
        algo = cls(algorithm_class(name).resume(model))
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        raise AssertionError("a search leaves no entry in a history")


Search.__signature__ = signature_of(Search)  # type: ignore[attr-defined]
