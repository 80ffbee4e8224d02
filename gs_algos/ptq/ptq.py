"""Quantizes after training, from a little data (PTQ): every layer is rounded so that its output changes least.

`gptq`: Frantar et al. 2023, arXiv:2210.17323. The correction for what the layers before have done wrong is that of
Zhang et al. (Qronos, arXiv:2505.11695), Arai and Ichikawa (QEP, arXiv:2504.09629) in one formula.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import Self, Unpack

from gs_algos.core.algorithm import (
    Algorithm,
    Inputs,
    asked_by,
    evaluating,
    history,
    live_entry,
    prepared_entry,
    refuse_prepared,
    remember,
    resumable_entry,
    run,
)
from gs_algos.core.batches import InputsOf, checked_batches, refuse_without_tensor
from gs_algos.core.config import AlgorithmConfig, signature_of
from gs_algos.core.layer_rules import resolve
from gs_algos.core.modules import all_or_nothing, get_module
from gs_algos.core.network import network_of, network_to_train, ordinary_tensors, without_autocast
from gs_algos.core.plan import Plan, PlanRow, other_weights, rows_of, totals_of
from gs_algos.core.plan_settings import RowSettings
from gs_algos.ptq import static
from gs_algos.ptq.block_loop import BlockLoop, held_out
from gs_algos.ptq.blocks import find_blocks
from gs_algos.ptq.compared import compared
from gs_algos.ptq.config import WIDTHS, PTQConfig, PTQOptions
from gs_algos.ptq.experts import close_experts, in_experts, open_experts, opened, refuse_different
from gs_algos.ptq.journal import digest_of, journal_at
from gs_algos.ptq.kv import KVScheme, refuse_without_cache
from gs_algos.ptq.layers import Rounded, Task, WeightGrid, swap_layers
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.report import PTQReport
from gs_algos.ptq.rounding import START, TUNED
from gs_algos.ptq.sites import Site, WeightRule, some_of, weight_sites
from gs_algos.ptq.transforms import network_transforms
from gs_algos.ptq.weights import NAME as PACKED
from gs_algos.ptq.weights import WeightPlan, install, restore_rotations, rotated, settings_of, summary
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.network.convert import Parity, convert_model
from gs_algos.quant.network.layer_plan import FORMS, LayerPlan
from gs_algos.quant.network.prepare import refuse_nonfinite
from gs_algos.quant.network.summary import summary_of
from gs_algos.quant.packed.grid import grid_of, stored_bits
from gs_algos.quant.packed.module import PackedFormat
from gs_algos.quant.packed.packable import format_of, in_rows, matrix_of
from gs_algos.quant.packed.round_to_nearest import signs_of
from gs_algos.quant.scheme import Scheme

logger = logging.getLogger(__name__)

ENOUGH = 16_384  # tokens, below which the codes fit the calibration data better than any other


@dataclass(frozen=True)
class RoundedPlan(RowSettings):
    """Describes one weight to be rounded.

    Args:
        names: the layers that share it, its owner first.
        weight: its scheme.
        format: of the packed weight.
        rounding: how it is rounded.
        act: scheme of what the layers read; None leaves it float.
    """

    form: ClassVar[str] = "rounded"

    names: tuple[str, ...]
    weight: str
    format: PackedFormat
    rounding: str
    act: str | None = None

    def other_names(self) -> tuple[str, ...]:
        return self.names[1:]


class PTQ(Algorithm):
    """Rounds a trained network from a little data. The options are those of `PTQConfig`, given by keyword.

    ```python
    algo = PTQ(weight="int4@group:64")
    net = algo.apply(net, example_inputs)
    algo.calibrate(net, batches, journal="journal")
    net = algo.convert(net)
    ```

    report: what the last calibration did, layer by layer.
    parity: with static activations, how far the last converted network was from the calibrated one.
    """

    name: ClassVar[str] = "ptq"
    row_settings: ClassVar[tuple[type[RowSettings], ...]] = (RoundedPlan, *FORMS)
    config_class: ClassVar[type[AlgorithmConfig]] = PTQConfig
    trains: ClassVar[bool] = False
    config: PTQConfig

    def __init__(
        self,
        config: PTQConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[PTQOptions],
    ) -> None:
        self.config = PTQConfig.choose(config, options)
        self.process_group = process_group
        self.steps = 0
        self.report: PTQReport | None = None
        self.parity: Parity | None = None
        self._example: Inputs | None = None
        self._model: nn.Module | None = None

    def plan(self, model: nn.Module, example_inputs: Inputs) -> Plan:
        """Lists every weight, its scheme and rounding or why it stays float, and the blocks; touches nothing."""
        with ordinary_tensors(), without_autocast(), torch.no_grad(), asked_by("PTQ.plan"):
            model = network_of(model, "PTQ.plan")
            if self.config.kv is not None:
                refuse_without_cache(model, KVScheme.parse(self.config.kv), "PTQ")
            if self.config.static:
                plan = static.plan_network(self.name, model, example_inputs, self.config)
            else:
                plan = self._plan(model)
            blocks = find_blocks(model, weights_of(plan.rows), example_inputs, self.config.blocks, "PTQ.plan")
            what = "the whole network" if blocks[0].name == "" else f"{blocks[0].name} to {blocks[-1].name}"
            notes = [f"{len(blocks)} {'block' if len(blocks) == 1 else 'blocks'}: {what}"]
            roundings = self._roundings(model, plan, example_inputs) if self.config.tuned else {}
            outside = [s for s, name in roundings.items() if name in TUNED and not any(b.holds(s) for b in blocks)]
            if outside:
                notes.append(f"rounded by {START} and not tuned, since outside the blocks: {some_of(outside)}")
            if self.config.kv is not None:
                notes.append(f"keys and values of the cache: {self.config.kv}")
            for name, transform in network_transforms(self.config.transforms).items():
                chains = transform.find(model, example_inputs, static.folded_norms(plan.rows))
                together = "; ".join(", ".join(layers) for layers in chains)
                notes.append(f"{name}: {together or 'no layers follow one another as it needs'}")
        return replace(plan, notes=(*plan.notes, *notes))

    def _roundings(self, model: nn.Module, plan: Plan, example_inputs: Inputs) -> dict[str, str]:
        """Returns how the weight of each layer of a plan is to be rounded."""
        if self.config.static:
            return static.planned_roundings(model, plan, example_inputs, self.config)
        return {row.site: row.settings.rounding for row in plan.acted()}

    def _plan(self, model: nn.Module) -> Plan:
        """Plans layers that become packed ones; experts are rows of their own."""
        with opened(model):
            rows: list[PlanRow] = [self._row(model, site, options) for site, options in self._sites(model)]
            refuse_different(rows, model, "PTQ")
            rows += other_weights(model, rows)
            after = {row.site: row.settings.format.nbytes for row in rows if row.settings is not None}
            return Plan(self.name, "", tuple(rows), (), totals_of(model, after))

    def apply(self, model: nn.Module, example_inputs: Inputs) -> nn.Module:
        """Makes the planned layers of the live model round their weights to nearest: it runs as the packed one will.

        With static activations batch norms are folded, and a model that itself calls `F.conv2d` or `F.linear` becomes
        another object with the same parameters, as in `SimQAT.apply`; `example_inputs` start the ranges.

        Raises:
            RuntimeError: if the model is prepared or packed already.
            ValueError: if the inputs do not run through the model, nothing can be rounded, or a weight, or what a layer
                with static activations sees, is not finite. The model is then as it was.
        """
        network = network_to_train(model, "PTQ.apply")
        with ordinary_tensors(), without_autocast(), asked_by("PTQ.apply"):
            if any(entry["algorithm"] in (self.name, PACKED) for entry in history(network)):
                raise RuntimeError("PTQ.apply: the model must not be rounded yet, got one that is; build it anew")
            refuse_prepared(network, "PTQ.apply")
            plan = self.plan(network, example_inputs)
            if not plan.acted():
                raise ValueError(f"PTQ.apply: at least one layer must be quantizable, got none:\n{plan}")
            with all_or_nothing(network), torch.no_grad():
                prepared, rows = network, plan.rows
                facts: dict[str, Any] = {}
                if self.config.static:
                    prepared, rows, facts = static.prepare(network, plan, example_inputs, self.config, "PTQ.apply")
                else:
                    open_experts(network, weights_of(plan.acted()))
                    for transform in network_transforms(self.config.transforms).values():
                        transform.run(network, example_inputs, "PTQ.apply")
                    facts = rotated(network)
                    self._swap_layers(network, plan)
                leave_fast_path(prepared)
                self.remember(prepared, "prepared", rows, calibrated=False, **facts)
        self._model, self._example, self.report = prepared, example_inputs, None
        return model if prepared is network else prepared

    def _swap_layers(self, model: nn.Module, plan: Plan) -> None:
        for row in plan.acted():
            layer: Any = get_module(model, row.site)
            scheme = Scheme.parse(row.settings.weight, "weight")
            grid = grid_of(matrix_of(layer, layer.weight.detach()), scheme)
            swap_layers(self._layers(model, row), WeightGrid(grid), row.settings.act)

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Inputs] | None = None,
        forward_loop: Callable[[nn.Module], None] | None = None,
        *,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        """Finds the codes of every weight, block by block, from `batches` of inputs.

        Every batch is run through each block several times, so all of them are held; a tenth enters no statistic and
        is for the report. In several processes (`torchrun`) each gives batches of its own, and rounds its share of the
        layers: they end with the same network, and the journal is that of the first.

        Args:
            journal: a folder in which what is done is kept: a call with the same model, options and data goes on there.

        Raises:
            TypeError: if the batches are no iterable.
            RuntimeError: if `apply` was not called on this model, it is calibrated already, or a call that failed has
                rounded a part of it.
            ValueError: if there is no batch or a `forward_loop`, the inputs do not run through the model, what a layer
                reads is not finite, or the journal is of another calibration. Blocks that were done by then stay
                rounded: build the model anew, or go on with the journal.
        """
        who = "PTQ.calibrate"
        network = network_of(model, who)
        entry = prepared_entry(network, self.name, who)
        if self._model is not network:
            raise RuntimeError(f"{who}: must come between apply and convert; call apply(model, inputs) first")
        if entry["calibrated"]:
            raise RuntimeError(f"{who}: the model must not be calibrated yet, got one that is; build it anew")
        if batches is None or forward_loop is not None:
            raise ValueError(f"{who}: it runs every block several times, so give batches, and no forward_loop")
        inputs_of = InputsOf(who, network, self._example)
        data = [inputs_of(batch) for batch in checked_batches(who, batches)]
        if not data:
            raise ValueError(f"{who}: at least one batch must be given, got none")
        for batch in data:
            refuse_without_tensor(batch, who)
        rows = rows_of(entry["plan"], self.row_settings)
        done, count = _rounded_layers(network)
        if done or entry.get("failed"):
            some = f"{len(done)} of {count}" if done else f"some of {count}"
            raise RuntimeError(
                f"{who}: the model must have its float weights, got {some} that a call which failed has rounded; build "
                "it anew"
            )
        with ordinary_tensors(), without_autocast(), torch.no_grad(), asked_by(who):
            processes = Processes(self.process_group)
            log = journal_at(journal if processes.rank == 0 else None, who)
            if log.folder is not None:
                log.begin(digest_of(network, replace(self.config, budget=0).to_dict(), data))  # which changes no code
            with self._tasks(network, rows) as tasks:
                example = data[0] if self._example is None else self._example
                blocks = find_blocks(network, weights_of(rows), example, self.config.blocks, who)
                loop = BlockLoop(network, tasks, blocks, data, self.config, log, processes, who)
                try:
                    self.report = loop.run()
                except BaseException:
                    live_entry(network)["failed"] = bool(_rounded_layers(network)[0])  # so that a saved one says it
                    raise
            if self.config.static:
                held = [data[number] for number in held_out(len(data))]
                static.set_ranges(network, data, held, self._example, self.config, processes, who)
        live = live_entry(network)
        live["calibrated"] = True
        live["plan"] = [self._calibrated(network, row).to_dict() for row in rows]

    def step(self) -> None:
        """Does nothing: there is no training."""

    def convert(self, model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
        """Replaces every rounded layer by packed codes, as `quantize_weights` leaves them, compared layer by layer.

        With static activations the layers become those of `SimQAT.convert`, compared in the same way.

        Raises:
            RuntimeError: if the model is not calibrated, though the rounding or static activations need it, or a packed
                layer gives something else than the calibrated one.
            ValueError: if a weight, a range or what a layer with static activations sees is not finite.
        """
        who = "PTQ.convert"
        network = network_of(model, who)
        entry = prepared_entry(network, self.name, who)
        if not entry["calibrated"] and (self.config.static or self._needs_data(entry)):
            raise RuntimeError(
                f"{who}: the model must be calibrated, got one that is not; call calibrate(model, batches)"
            )
        example = self._example if example_inputs is None else example_inputs
        if example is None:
            raise RuntimeError(f"{who}: a resumed algorithm has no example inputs; give example_inputs")
        rows = rows_of(entry["plan"], self.row_settings)
        with ordinary_tensors(), without_autocast(), asked_by(who), all_or_nothing(network):
            if self.config.static:
                refuse_nonfinite(who, network.named_modules())
                self.parity, rows = convert_model(network, rows, example)
                remember(network, {**entry, "stage": "converted", "plan": [row.to_dict() for row in rows]})
            else:
                self._convert(network, rows, example, who)
        self._model = None
        return network

    def _convert(self, network: nn.Module, rows: list[PlanRow], example: Inputs, who: str) -> None:
        """Packs the rounded layers."""
        with torch.no_grad():
            rounded = {name: get_module(network, name) for name in weights_of(rows)}
            packed = [self._pack(network, row) for row in rows]
            with evaluating(network), compared(network, rounded) as errors:
                run(network, example, who)
            unseen = [name for name in rounded if name not in errors]
            if unseen:
                logger.warning(
                    "%s: %d packed layers were not compared, since the inputs do not reach them: %s",
                    who,
                    len(unseen),
                    some_of(unseen),
                )
            for name, (error, most) in errors.items():
                if not error <= most:
                    raise RuntimeError(
                        f"{who}: {name} must give what the calibrated layer gives to {most:.1%}, got a difference of "
                        f"{error:.2%}"
                    )
            config = settings_of(self.config.weight, self.config.embeddings, self._weight_rules(), self.config.kv)
            packed = close_experts(network, packed)
            plan = [row.to_dict() for row in packed]
            remember(
                network,
                {
                    **{"algorithm": PACKED, "stage": "converted", "steps": 0, "config": config, "plan": plan},
                    **rotated(network),
                },
                replaces=self.name,
            )

    def summary(self, model: nn.Module) -> str:
        """Returns a table of the packed layers; before `convert`, of what the last calibration did."""
        network = network_of(model, "PTQ.summary")
        if any(isinstance(module, Rounded | FakeQuantized) for module in network.modules()):
            return str(self.report) if self.report is not None else _not_calibrated(network)
        return summary_of(network) if self.config.static else summary(network)

    @classmethod
    def resume(cls, model: nn.Module) -> Self:
        """Returns the algorithm of a prepared model that `load` gave back.

        Raises:
            RuntimeError: if the model was not saved while prepared.
        """
        model = network_of(model, "PTQ.resume")
        algo = cls(PTQConfig.from_dict(resumable_entry(model, cls.name, "PTQ")["config"]))
        algo._model = model
        return algo

    @classmethod
    def restore(cls, model: nn.Module, entry: dict[str, Any]) -> nn.Module:
        config = PTQConfig.from_dict(entry["config"])
        if config.static:
            return static.restore(model, entry, config)
        rows = rows_of(entry["plan"], cls.row_settings)
        open_experts(model, weights_of(rows))
        for row in rows:
            if row.settings is None:
                continue
            layers = cls._layers(model, row)
            device: Any = layers[0].weight.device
            grid = WeightGrid.empty(row.settings.format, Scheme.parse(row.settings.weight, "weight"), device)
            swap_layers(layers, grid, row.settings.act)
            for layer in layers:
                layer.solved = entry["calibrated"]  # type: ignore[assignment]
        restore_rotations(model, entry)
        leave_fast_path(model)
        return model

    def _weight_rules(self) -> list[WeightRule]:
        """Returns the rules on weights, as `quantize_weights` takes them."""
        rules: list[WeightRule] = []
        for pattern, options in self.config.rules:
            if options is None or "weight" in options:
                rules.append((pattern, None if options is None else {"weight": options["weight"]}))
        return rules

    def _sites(self, model: nn.Module) -> list[tuple[Site, Mapping[str, Any]]]:
        """Returns every weight with its options."""
        sites = weight_sites(model, self.config.weight, self.config.embeddings, self._weight_rules(), "PTQ", WIDTHS)
        layers = {name: get_module(model, name) for site in sites for name in site.names}
        options = {"weight": None, "act": self.config.act, "rounding": self.config.rounding}
        chosen = resolve(self.config.rules, layers, options, "PTQ")
        given = [(site, chosen[site.names[0]] or options) for site in sites]
        return [(site, {**own, "act": None} if in_experts(model, site.names[0]) else own) for site, own in given]

    def _row(self, model: nn.Module, site: Site, options: Mapping[str, Any]) -> PlanRow:
        if site.scheme is None:
            return PlanRow(site.names[0], site.kind, "keep", reason=site.reason)
        weight: Any = site.layer.weight
        if not bool(weight.isfinite().all()):
            raise ValueError(f"PTQ: {site.names[0]}.weight must be finite, got NaN or Inf")
        embedding = isinstance(site.layer, nn.Embedding)
        linear = isinstance(site.layer, nn.Linear)
        rounding = "nearest" if embedding else options["rounding"]
        act = options["act"] if linear else None
        if site.scheme.is_float and (rounding in TUNED or act is not None):
            given = f"rounding {rounding!r}" if rounding in TUNED else f"act {act!r}"
            raise ValueError(
                f"PTQ: layers of 4-bit floats are rounded by nearest or gptq, and read floats, got {site.scheme} with "
                f"{given} for {site.names[0]}; change one, for all or by a rule"
            )
        stored = f" (stored in {stored_bits(site.scheme)} bits)" if site.scheme.bits != stored_bits(site.scheme) else ""
        detail = f"weight {site.scheme}{stored}, {rounding}" + (f", act {act}" if act else "")
        plan = RoundedPlan(site.names, str(site.scheme), format_of(site.layer, weight, site.scheme), rounding, act)
        return PlanRow(site.names[0], site.kind, "round", detail, settings=plan)

    @staticmethod
    def _layers(model: nn.Module, row: PlanRow[RoundedPlan]) -> list[Any]:
        return [get_module(model, name) for name in row.settings.names]

    def _tasks(self, model: nn.Module, rows: Sequence[PlanRow]) -> AbstractContextManager[dict[str, Task]]:
        """Gives the weights to be rounded, by site, in a context in which the block loop can round them."""
        if self.config.static:
            return static.solvable_layers(model, rows, self.config)
        return nullcontext({row.site: self._task(model, row) for row in rows if row.settings is not None})

    def _task(self, model: nn.Module, row: PlanRow[RoundedPlan]) -> Task:
        scheme = Scheme.parse(row.settings.weight, "weight")
        return Task(row.site, tuple(self._layers(model, row)), scheme, row.settings.rounding)

    def _calibrated(self, model: nn.Module, row: PlanRow) -> PlanRow:
        """Returns the row with the format that the weight has now."""
        if not isinstance(row.settings, RoundedPlan):
            return row
        layer: Any = get_module(model, row.site)
        dtype = str(layer.weight_grid.grid.dtype).removeprefix("torch.")
        format = replace(row.settings.format, scale_dtype=dtype)
        return replace(row, settings=replace(row.settings, format=format))

    @staticmethod
    def _needs_data(entry: Mapping[str, Any]) -> bool:
        return any(row["settings"] and row["settings"]["rounding"] != "nearest" for row in entry["plan"])

    def _pack(self, model: nn.Module, row: PlanRow) -> PlanRow:
        """Replaces the layers of one row by packed ones; returns the row of `quantize_weights` for them."""
        if row.settings is None:
            return row
        layer: Any = get_module(model, row.site)
        scheme = Scheme.parse(row.settings.weight, "weight")
        packed = layer.packed_weight()
        install(model, row.settings.names, in_rows(layer, packed), row.settings.act)
        new: Any = get_module(model, row.site)
        new.signs = signs_of(scheme)
        plan = WeightPlan(row.settings.names, str(scheme), PackedFormat.of(packed), row.settings.act)
        return PlanRow(row.site, row.kind, "pack", str(scheme), settings=plan)


def _not_calibrated(network: nn.Module) -> str:
    """Says in a line how far a prepared network is."""
    done, count = _rounded_layers(network)
    if not done:
        return "PTQ: rounded to nearest; not calibrated yet"
    return f"PTQ: the calibration failed behind {done[-1]}, layer {len(done)} of {count}; build the model anew"


def _rounded_layers(network: nn.Module) -> tuple[list[str], int]:
    """Returns the layers of a prepared network whose codes are found, and the number of all."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, Rounded | FakeQuantized)}
    done = [n for n, m in layers.items() if (m.solved if isinstance(m, Rounded) else m.weight_quantizer.fixed)]
    return done, len(layers)


def weights_of(rows: Iterable[PlanRow]) -> list[str]:
    """Returns the names of the layers whose weights the rows of a plan round."""
    rounded = [row for row in rows if isinstance(row.settings, RoundedPlan | LayerPlan)]
    return [name for row in rounded for name in (row.site, *row.settings.other_names())]


PTQ.__signature__ = signature_of(PTQ)  # type: ignore[attr-defined]
