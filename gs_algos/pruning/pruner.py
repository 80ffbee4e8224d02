"""Holds what all pruning algorithms share: finds groups, masks the units of the lowest scores, and cuts them out.

A prepared network trains in two phases. For `select_steps` optimizer steps something is learned about each channel,
of most algorithms while the weights stand still; then the worst units become zeros, which `step` keeps, and the rest is
trained on. `convert` cuts the zeros out.
"""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gs_algos.core.algorithm import (
    Inputs,
    Migration,
    asked_by,
    history,
    remember,
    run,
)
from gs_algos.core.batches import InputsOf, checked_batches
from gs_algos.core.input_statistics import InputStatistics
from gs_algos.core.modules import all_or_nothing, get_module
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors
from gs_algos.core.plan import Plan, render_layers, rows_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.core.progress import progress
from gs_algos.core.training import TrainingAlgorithm
from gs_algos.pruning.budget import Rates, total_rate
from gs_algos.pruning.channel_gates import Freezer, GatedLayer, remove_freezers
from gs_algos.pruning.channel_groups.groups import Group, Groups, refuse_foreign_groups
from gs_algos.pruning.channel_groups.trial_cut import compared
from gs_algos.pruning.config import PruningConfig
from gs_algos.pruning.cut import cut, mask, removed, resize, zeros
from gs_algos.pruning.planning import GroupPlan, choose_units, from_version_1, make_plan
from gs_algos.pruning.reconstruct import reconstruct
from gs_kernels.runtime.torch_private import _NormBase

logger = logging.getLogger(__name__)

KEPT = "kept_units"  # buffer on the root of a prepared model: bool [units], which stay


class Pruner(TrainingAlgorithm):
    """Finds, masks and cuts channels. A subclass says which layers get gates, what a step learns, and the scores."""

    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (GroupPlan,)
    migrations: ClassVar[Mapping[int, Migration]] = {1: from_version_1}
    config_class: ClassVar[type[PruningConfig]] = PruningConfig
    config: PruningConfig

    def __init__(
        self, config: PruningConfig | None = None, *, process_group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self.process_group = process_group
        self.groups: Groups | None = None
        self.error: float | None = None  # of convert: relative RMS of the cut network's outputs
        self._steps = 0
        self._rates: Rates = {}
        self._gated: dict[str, GatedLayer] = {}
        self._freezer = Freezer()
        self._zeros: list[tuple[Tensor, int, Tensor]] = []
        self._gone: list[Tensor] = []  # what was where `_zeros` are, until the next step

    @abstractmethod
    def gated_layer_sizes(self, model: nn.Module, groups: Groups, rates: Rates) -> dict[str, int]:
        """Returns module -> channels, of the layers that get a gate for the first phase. rates: of what may be cut."""

    @abstractmethod
    def put_gate(self, model: nn.Module, site: str, size: int, groups: Groups) -> None:
        """Puts a gate on a layer of the model."""

    @abstractmethod
    def learn(self, layers: Iterable[GatedLayer]) -> None:
        """Takes one step of the first phase; the gradients of the gates are averaged over all ranks."""

    @abstractmethod
    def scores(self, model: nn.Module, groups: Groups) -> Tensor:
        """Returns `[units]`: the higher, the more a unit matters; NaN where nothing tells."""

    def why_unscored(self, model: nn.Module, group: Group, groups: Groups) -> str:
        """Says why the units of a group cannot be scored; "" if they can."""
        return ""

    @property
    def still(self) -> bool:
        """Says whether weights stand still in the first phase, if layers have gates."""
        return True

    @property
    def scores_weights(self) -> bool:
        """Says whether scores are of weights alone: a search can then ask for them before any step."""
        return False

    def freezer(self) -> Freezer:
        """Makes the freezer of the first phase, which may change inputs and outputs of a forward."""
        return Freezer()

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        """Continues a resumed training at a step; the tensors of the model are already those of that step."""
        self._steps = value
        self._enter_phase()

    @property
    def selecting(self) -> bool:
        """Says whether weights stand still and the cut is not decided."""
        return self._steps < self.config.select_steps

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every group of coupled channels, how many of its units go, or why they stay; touches nothing.

        Raises:
            ValueError: if the inputs do not run through the model, a rule matches nothing, or no cut meets the budget.
        """
        with ordinary_tensors(), asked_by(f"{self.config.who}.plan"):
            network = network_of(model, f"{self.config.who}.plan")
            return make_plan(self.name, self.config, network, example_inputs, self.why_unscored)[0]

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Finds the groups of the live model and puts gates on its layers; float state_dict keys stay as they are.

        The worst units become zeros after `select_steps` steps; at once if there are none.

        Raises:
            RuntimeError: if the model is prepared by another algorithm, or by this one.
            ValueError: as `plan`, or if no group can lose a unit. The model is then as it was.
        """
        network = network_to_train(model, f"{self.config.who}.apply")
        with ordinary_tensors(), asked_by(f"{self.config.who}.apply"):
            self._apply(network, example_inputs)
        return model

    def _apply(self, model: nn.Module, example_inputs: Inputs) -> None:
        if history(model) and history(model)[-1]["stage"] == "prepared":
            before = history(model)[-1]["algorithm"]
            raise RuntimeError(f"{self.config.who}.apply: the model is still prepared by {before}; convert it first")
        plan, groups, rates = make_plan(self.name, self.config, model, example_inputs, self.why_unscored)
        if not plan.acted():
            raise ValueError(f"{self.config.who}.apply: at least one group must lose a unit, got none{_why(plan)}")
        self._example = example_inputs
        with all_or_nothing(model):
            sites = self.gated_layer_sizes(model, groups, rates) if self.config.select_steps else {}
            prepare(self, model, groups, sites)
            entry = {
                "algorithm": self.name,
                "stage": "prepared",
                "steps": 0,
                "config": self.config.to_dict(),
                "plan": [row.to_dict() for row in plan.rows],
                "groups": groups.to_dict(),
                "gates": sites,
                "rates": dict(rates),
            }
            self._steps = 0
            self._bind(model, groups, rates)
            self._history = remember(model, entry)
            if not self.config.select_steps:
                self._select()

    def step(self) -> None:
        """Learns from the last gradients in the first phase, keeps the zeros in the second. After every optimizer step.

        Raises:
            RuntimeError: if `apply` was not called, a weight got a gradient in the first phase, or no channel did.
        """
        model = self._require_bound("step")
        if self.selecting:
            for name, parameter in model.named_parameters() if self._freezer.on else ():
                if parameter.grad is not None:
                    how = "run the model as a whole, without gradient checkpointing"
                    raise RuntimeError(
                        f"{self.config.who}.step: weights must stand still for {self.config.select_steps} steps, got a "
                        f"gradient in {name}; {how if model.training else 'call model.train() first'}"
                    )
            self._average_gradients()
            self.learn(self._gated.values())
            for layer in self._gated.values():
                layer.gate.grad = None
            if self._steps + 1 == self.config.select_steps:
                self._refuse_unlearned()
        self._steps += 1
        self._history["steps"] = self._steps
        if self._steps == self.config.select_steps:
            self._select()
        elif not self.selecting:
            self._gone = []
            self._mask()

    def _refuse_unlearned(self) -> None:
        """Raises if no channel got a gradient by which the cut could be decided."""
        if self._gated and not any(bool(layer.gate_square.any()) for layer in self._gated.values()):
            raise RuntimeError(
                f"{self.config.who}.step: the first {self.config.select_steps} steps must show how much each channel "
                "matters, got no gradient in any; run batches through the model in train mode, loss.backward(), step"
            )

    def _average_gradients(self) -> None:
        """Averages the gradients of the gates over all ranks: DistributedDataParallel does not reduce buffers."""
        if not self._has_ranks():
            return
        for layer in self._gated.values():
            layer.gate.grad = torch.zeros_like(layer.gate) if layer.gate.grad is None else layer.gate.grad
            dist.all_reduce(layer.gate.grad, group=self.process_group)
            layer.gate.grad /= dist.get_world_size(self.process_group)

    def _has_ranks(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def _select(self) -> None:
        """Decides which units go, and zeroes them."""
        model = self._require_bound("step")
        assert self.groups is not None
        keep = choose_units(self.config, self.groups, self.scores(model, self.groups), self._rates, model)
        getattr(model, KEPT).copy_(keep)
        logger.info("%s: %.1f %% of the channels go", self.name, 100 * total_rate(self.groups, keep))
        self._enter_phase()
        if self.config.reconstruct:
            self._gone = [t.data.index_select(dim, index) for t, dim, index in self._zeros]
        self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        for tensor, dim, index in self._zeros:
            tensor.data.index_fill_(dim, index, 0)

    def _enter_phase(self) -> None:
        """Turns the gates on in the first phase; in the second finds the tensors that hold the zeros."""
        gating = self.selecting and bool(self._gated)
        self._freezer.on = gating and self.still
        for layer in self._gated.values():
            layer.gate_on = gating
        self._zeros = []
        if self._model is not None and self.groups is not None and not self.selecting:
            self._zeros = zeros(self._model, self.groups, getattr(self._model, KEPT).cpu())

    def reconstruct(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        """Refits what reads the pruned channels so that its outputs change least, by least squares on some batches.

        Call it once the cut is decided and before the next step, then `refresh`; on every rank, with inputs of its own.
        Some hundred inputs are enough; a batch is run through the layers in front of each refitted layer.

        Args:
            batches: of inputs; `(x, y)` counts as x.

        Raises:
            RuntimeError: if the cut is not decided, or what went is not kept: `reconstruct=False`, or a step was taken
                since, or the algorithm was resumed.
            TypeError: if the batches are no iterable.
            ValueError: if no batch runs through the model, or inputs are not finite. Weights are then as they were.
        """
        who = f"{self.config.who}.reconstruct"
        model = network_of(model, who)
        if self._require_bound("reconstruct") is not model:
            raise RuntimeError(f"{who}: the model must be the one that the algorithm trains, got another")
        if self.selecting:
            raise RuntimeError(f"{who}: the cut must be decided, got step {self._steps} of {self.config.select_steps}")
        if not self._gone or self.groups is None:
            lost = "a step, an earlier call or a resumed algorithm"
            why = lost if self.config.reconstruct else "reconstruct=False"
            raise RuntimeError(
                f"{who}: the weights that went must be kept, got {why}; "
                f"make {self.config.who}(reconstruct=True), and call this once, right after the cut is decided"
            )
        inputs_of = InputsOf(who, model, self._example)
        given = [inputs_of(batch) for batch in checked_batches(who, batches)]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        whole = copy.deepcopy(model)
        parameters = dict(whole.named_parameters())
        for (tensor, dim, index), values in zip(self._zeros, self._gone, strict=True):
            parameters[names[id(tensor)]].data.index_copy_(dim, index, values)
        keep = getattr(model, KEPT).cpu()
        reconstruct(model, whole, self.groups, keep, given, who, self._add_up)
        self._gone = []

    def _add_up(self, statistics: InputStatistics) -> None:
        if self._has_ranks():
            statistics.all_reduce(self.process_group)

    def refresh(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Measures the batch norm statistics of the masked network anew: the mean over all batches. Weights stay.

        Raises:
            RuntimeError: if the cut is not decided yet.
            TypeError: if the batches are no iterable.
            ValueError: if not exactly one of `batches` and `forward_loop` is given, or no batch runs through the model.
                The statistics are then as they were.
        """
        who = f"{self.config.who}.refresh"
        model = network_of(model, who)
        if self._require_bound("refresh") and self.selecting:
            raise RuntimeError(f"{who}: the cut must be decided, got step {self._steps} of {self.config.select_steps}")
        if (batches is None) == (forward_loop is None):
            raise ValueError(f"{who}: give either batches or forward_loop")
        batches, inputs_of = (
            checked_batches(who, () if batches is None else batches),
            InputsOf(who, model, self._example),
        )
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        flags = {m: m.training for m in model.modules()}
        momenta = {m: m.momentum for m in norms}
        before = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
        done = False
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            model.train()
            with torch.no_grad():
                if forward_loop is not None:
                    forward_loop(model)
                for batch in progress(batches, "refreshing batch norms"):
                    run(model, inputs_of(batch), who)
            if norms and all(m.num_batches_tracked == 0 for m in norms):
                raise ValueError(f"{who}: at least one batch must run through the model, got none")
            done = True
        finally:
            for own, value in before if not done else ():
                own.copy_(value)
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            for module, flag in flags.items():
                module.training = flag

    def convert(
        self,
        model: nn.Module,
        example_inputs: Inputs | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> nn.Module:
        """Cuts the zeros out of every tensor of the live model, after a trial cut gave the same outputs.

        Parameters stay the same objects. optimizers: whose state is cut along.

        Raises:
            RuntimeError: if the model is not prepared, the cut is not decided, or the cut network's outputs differ. The
                model is then as it was.
        """
        who = f"{self.config.who}.convert"
        model, entry, example = self.to_convert(model, example_inputs, who)
        if self.selecting:
            raise RuntimeError(f"{who}: the cut must be decided, got step {self._steps} of {self.config.select_steps}")
        groups = Groups.from_dict(entry["groups"])
        keep = getattr(model, KEPT).cpu()
        own = model is self._model
        with ordinary_tensors():
            mask(model, groups, keep)
            self.error = compared(who, model, groups, keep, example)
            release(model, entry["gates"])
            done = cut(model, groups, keep, optimizers)
        converted = {key: value for key, value in entry.items() if key not in ("groups", "gates", "rates")}
        shapes = {"shapes": done.shapes, "attributes": done.attributes, "removed": removed(groups, keep)}
        remember(model, {**converted, "stage": "converted", "steps": self._steps, **shapes})
        if own:  # a copy may be converted while the training of the original goes on
            self._model, self._gated, self.groups, self._zeros, self._gone = None, {}, None, [], []
        return model

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the groups: what has gone from each, and the channels that its layers have left."""
        model = network_of(model, f"{self.config.who}.summary")
        entry = next((e for e in reversed(history(model)) if e["algorithm"] == self.name), None)
        if entry is None:
            return f"{self.name}: not applied"
        gone = entry.get("removed")
        if gone is None:
            gone = removed(Groups.from_dict(entry["groups"]), getattr(model, KEPT).cpu())
        rows = []
        for row in rows_of(entry["plan"], self.row_settings):
            if isinstance(row.settings, GroupPlan):
                left = f"{row.settings.units - len(gone.get(row.site, []))} of {row.settings.units}"
                rows.append((row.site, row.kind, left, ", ".join(row.settings.layers[1:])))
        return render_layers(("group", "kind", "units left", "and with it"), rows)

    def bind_again(self, model: nn.Module, entry: dict[str, Any]) -> None:
        self._bind(model, Groups.from_dict(entry["groups"]), entry["rates"])

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        if entry["stage"] == "converted":
            resize(model, entry["shapes"], entry["attributes"])
            return model
        algo = cls(cls.config_class.from_dict(entry["config"]))
        groups = Groups.from_dict(entry["groups"])
        refuse_foreign_groups(groups, model)
        prepare(algo, model, groups, entry["gates"])
        return model

    def _bind(self, model: nn.Module, groups: Groups, rates: Rates) -> None:
        """Remembers the live layers that `step` has to visit."""
        self._model, self.groups, self._rates = model, groups, rates
        self._gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedLayer)}
        self._freezer = self.freezer()
        if self._gated:
            remove_freezers(model)  # a model that was pickled has those of its old algorithm
            self._freezer.attach(model)
        self._enter_phase()


def _why(plan: Plan) -> str:
    """Says why a plan cuts nothing, and what to do."""
    if not plan.rows:
        return "; the network has no layer whose channels nothing else needs"
    whole = any("stay at this rate" in row.reason for row in plan.rows)
    return f"{'; give a higher rate, or a smaller round_to' if whole else ''}:\n{plan}"


def prepare(algo: Pruner, model: nn.Module, groups: Groups, gates: dict[str, int]) -> None:
    """Gives a model the gates and the buffer of a prepared one."""
    for name, size in gates.items():
        module = get_module(model, name)
        if not any(size in parameter.shape for parameter in module.parameters()):
            raise ValueError(f"{algo.config.who}: {name} must have {size} channels; the model is another one")
        algo.put_gate(model, name, size, groups)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.register_buffer(KEPT, torch.ones(groups.n, dtype=torch.bool, device=device))
    for parameter in model.parameters():
        parameter.grad = None


def release(model: nn.Module, gates: Iterable[str]) -> None:
    """Takes off what `prepare` put on."""
    for name in gates:
        module: Any = get_module(model, name)
        module.remove_gate()
    remove_freezers(model)
    del model._buffers[KEPT]
