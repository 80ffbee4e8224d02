"""Rounds a network block by block: statistics of what each layer sees, codes that make the least error of its output.

Of every block: the float stream runs through it while it is float; then, stage by stage, the quantized stream shows
what the layers of the stage see behind all that is rounded already, and their weights are found; then the quantized
stream moves on. What stands outside the chain of blocks, a head or a stem, follows in the order it is called in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs
from gs_algos.core.input_rows import groups_of, input_rows, token_mask
from gs_algos.core.input_statistics import InputStatistics
from gs_algos.core.progress import progress_bar
from gs_algos.ptq.blocks import Block
from gs_algos.ptq.config import PTQConfig
from gs_algos.ptq.journal import Journal, Solved, from_bytes, to_bytes
from gs_algos.ptq.layer_inputs import Floats, Seen, held_out_ratio
from gs_algos.ptq.layers import Rounded, Task, floating, install
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.replay import Replay
from gs_algos.ptq.report import BlockErrors, BlockReport, LayerReport, PTQReport
from gs_algos.ptq.rounding import START, TUNED
from gs_algos.ptq.rounding.tuned import fraction_of
from gs_algos.ptq.routed import LENT, Route
from gs_algos.ptq.solve import Solution, SolveOptions, solve
from gs_algos.ptq.stages import Stage, all_inputs, find_stages, inputs_of, unrouted_input
from gs_algos.ptq.streams import ActivationStore, Streams
from gs_algos.ptq.transforms import stage_transforms
from gs_algos.ptq.transforms.stage import NOT_SCALED, Scaled, StageScaler
from gs_algos.ptq.tune import BlockTuner
from gs_algos.quant.packed.packable import matrix_of

logger = logging.getLogger(__name__)

TUNING = 0.95  # share of the time of a block that is tuned, for the progress bar
HELD_OUT = 10  # one batch of so many enters no statistic: it says how well the codes do on other data


def held_out(count: int) -> range:
    """Returns the numbers of the batches, of so many, that enter no statistic: none of a single one."""
    held = count // HELD_OUT if count >= HELD_OUT else int(count > 1)
    return range(count - held, count)


class BlockLoop:
    """Rounds every weight of a prepared network. `run` does it once.

    Args:
        tasks: by site, in the order of the modules.
        batches: inputs of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task],
        blocks: Sequence[Block],
        batches: Sequence[Inputs],
        config: PTQConfig,
        journal: Journal,
        processes: Processes,
        who: str = "PTQ.calibrate",
    ) -> None:
        self.model, self.tasks, self.blocks, self.batches = model, tasks, blocks, batches
        self.config, self.journal, self.processes, self.who = config, journal, processes, who
        self.masks = [token_mask(batch) for batch in batches]
        self.held_out = set(held_out(len(batches)))
        self.transforms = stage_transforms(config.transforms)
        self.floats = config.correct > 0 or config.bias or any(task.rounding in TUNED for task in tasks.values())
        self.advance: Callable[[float], None]  # of the progress bar, in blocks
        self.by_data = {site: task for site, task in tasks.items() if task.by_data}
        self.layers: list[LayerReport] = []
        self.reports: list[BlockReport] = []

    def run(self) -> PTQReport:
        """Rounds block by block and returns what came of it."""
        begun = perf_counter()
        with (
            ActivationStore(self.config.budget, self.journal.folder) as store,
            progress_bar(len(self.blocks), "rounding blocks") as self.advance,
        ):
            streams = Streams(
                self.model,
                self.batches,
                self.blocks,
                store,
                self.floats,
                self.who,
                self._float_network,
                self._round_embeddings,
            )
            for index, block in enumerate(self.blocks):
                tasks = {site: task for site, task in self.by_data.items() if block.holds(site)}
                self._round_block(streams, index, block, tasks)
            peak, on_disk = store.peak, store.on_disk
        outside = {s: t for s, t in self.by_data.items() if not any(block.holds(s) for block in self.blocks)}
        self._round_outside(outside)
        if self.transforms and all(text.startswith(NOT_SCALED) for one in self.layers for text in one.transforms):
            names = ", ".join(self.transforms)
            logger.warning("%s: %s scaled nothing: no layer can take a scale back; see the report", self.who, names)
        tokens = max((report.rows for report in self.layers), default=0)
        return PTQReport(
            tuple(self.layers), tuple(self.reports), tokens, perf_counter() - begun, peak, on_disk, len(self.held_out)
        )

    def _round_block(self, streams: Streams, index: int, block: Block, tasks: Mapping[str, Task]) -> None:
        layers = {site: task.layer for site, task in tasks.items()}
        tuned = sorted({task.rounding for task in tasks.values()} & TUNED.keys())
        with self._float_network():
            stages = self._stages(streams, block, layers)
            floats = self._float_pass(streams, block, stages, layers, bool(tuned))
        if streams.whole:
            self._round_embeddings()
        done, replay = self._done(index), self._replay(streams, block)
        if done is None:
            solved: dict[str, Solved] = {}
            for stage in stages:
                chosen = {site: tasks[site] for site in stage.sites}
                solved |= self._round_stage(streams, block, stage, chosen, floats, solved, replay)
            if tuned:
                replay.clear()
            for rounding in tuned:
                chosen = {site: task for site, task in tasks.items() if task.rounding == rounding}
                solved |= self._tune(streams, index, block, chosen, solved, floats, TUNING / len(tuned))
            self.journal.write(index, solved)
        else:
            self._install(done)
        for tensor in floats.kept():
            streams.store.drop(tensor)
        self._advance(streams, block, replay)
        self.advance(1 - TUNING if tuned and done is None else 1)

    def _float_pass(
        self, streams: Streams, block: Block, stages: Sequence[Stage], layers: Mapping[str, Rounded], tuned: bool
    ) -> Floats:
        """Moves the float stream on; returns what the first layer of every stage saw of each batch.

        tuned: whether what goes into the block and comes out of it is to be kept, too.
        """
        seen = Floats()
        if not self.floats:
            return seen
        for number in range(len(self.batches)):
            inputs, output = all_inputs(streams, block, number, stages, layers)
            for site, (tensors, places) in inputs.items():
                seen.inputs[site].append([streams.store.keep(x) for x in tensors])
                seen.places[site].append(places)
            if tuned:
                assert output is not None
                seen.outputs.append(streams.store.keep(output))
                if streams.floats:
                    seen.block_inputs.append(streams.store.keep(streams.floats[number]))
            if not streams.whole:
                assert output is not None
                streams.advance(number, output, floats=True)
        return seen

    def _tune(
        self,
        streams: Streams,
        index: int,
        block: Block,
        tasks: Mapping[str, Task],
        solved: Mapping[str, Solved],
        floats: Floats,
        share: float,
    ) -> dict[str, Solved]:
        """Tunes the layers of the block that have one rounding, and installs what was found.

        share: of the block's time, for the progress bar.
        """
        tuner = BlockTuner(
            streams,
            block,
            index,
            floats.block_inputs,
            floats.outputs,
            tasks,
            {site: solved[site] for site in tasks},
            self.masks,
            sorted(self.held_out),
            self.config.steps,
            self.config.lr,
            self.processes,
            lambda done: self.advance(done * share),
            self.who,
        )
        found = tuner.run()
        for site, one in found.items():
            install(self.tasks[site].layers, one)
            number = next(i for i, report in enumerate(self.layers) if report.site == site)
            self.layers[number] = one.report
        return found

    def _round_stage(
        self,
        streams: Streams,
        block: Block,
        stage: Stage,
        tasks: Mapping[str, Task],
        floats: Floats,
        before: Mapping[str, Solved],
        replay: Replay,
    ) -> dict[str, Solved]:
        """Returns what was found for the layers of the stage, and what changed of those `before` it in the block."""
        scaled = self._scale_stage(streams, block, stage, tasks, before)
        layer = tasks[stage.first].layer
        means = self.config.bias and any(getattr(task.layer, "bias", None) is not None for task in tasks.values())
        seen = Seen(layer, *floats.of(stage), self.config.correct > 0, scaled, means)
        for number in range(len(self.batches)) if stage.calls else ():
            with replay.running(number):
                inputs = inputs_of(streams, block, number, layer, stage.calls, stage.route)
            seen.update(number, *inputs, self.masks[number], number in self.held_out)
        if self.processes.several:
            seen.sum_over(self.processes)
        own = seen.statistics
        if stage.route is not None and own.count < own.columns:
            own.lend(self._unrouted(streams, block, stage.route, layer), round(LENT * own.columns))
        return {**scaled.solved, **self._solve(tasks, seen, scaled)}

    def _unrouted(self, streams: Streams, block: Block, route: Route, layer: Rounded) -> InputStatistics:
        """Sums what a layer would see if all tokens went to it."""
        every = InputStatistics(matrix_of(layer, layer.float_weight).shape[1], device=layer.float_weight.device)
        for number in range(len(self.batches)):
            if number not in self.held_out:
                x = unrouted_input(streams, block, number, layer, route, self.masks[number])
                every.update(input_rows(layer, layer.seen(x)))
        if self.processes.several:
            every.all_reduce(self.processes.group)
        return every

    def _scale_stage(
        self, streams: Streams, block: Block, stage: Stage, tasks: Mapping[str, Task], before: Mapping[str, Solved]
    ) -> Scaled:
        """Applies the transforms to what the layers of the stage read."""
        if not self.transforms:
            return Scaled()
        scaler = StageScaler(
            self.model,
            streams,
            block,
            stage,
            tasks,
            self.masks,
            [number for number in range(len(self.batches)) if number not in self.held_out],
            before,
            self._float_network,
            self.processes,
        )
        return scaler.run(self.transforms)

    def _float_network(self) -> AbstractContextManager[None]:
        return floating(layer for task in self.tasks.values() for layer in task.layers)

    def _round_outside(self, tasks: Mapping[str, Task]) -> None:
        """Rounds the layers outside the chain, one by one in the order of their calls, from the rounded network."""
        if not tasks:
            return
        index = len(self.blocks)
        done = self._done(index)
        if done is not None:
            self._install(done)
            return
        whole = [Block(("",))]
        with ActivationStore(self.config.budget) as store:
            streams = Streams(self.model, self.batches, whole, store, False, self.who)
            layers = {site: task.layer for site, task in tasks.items()}
            replay = self._replay(streams, whole[0])
            solved: dict[str, Solved] = {}
            for stage in self._stages(streams, whole[0], layers):
                chosen = {site: tasks[site] for site in stage.sites}
                solved |= self._round_stage(streams, whole[0], stage, chosen, Floats(), solved, replay)
        self.journal.write(index, {site: replace(one, fraction=None) for site, one in solved.items()})

    def _solve(self, tasks: Mapping[str, Task], seen: Seen, scaled: Scaled) -> dict[str, Solved]:
        """Finds the codes of the layers of one stage and installs them."""
        seen.statistics.check(f"{self.who}: {next(iter(tasks))}")  # in every process, so that none waits for another
        solved = {}
        for number, (site, task) in enumerate(tasks.items()):
            if number % self.processes.count != self.processes.rank:
                continue
            tuned = task.rounding in TUNED
            options = SolveOptions(
                START if tuned else task.rounding,
                self.config.correct,
                self.config.refine,
                self.config.order,
                self.config.damp,
                positive=self.config.static,
            )
            layer = task.layer
            weight = matrix_of(layer, layer.float_weight.detach())
            solution = solve(weight, seen.statistics, task.scheme, options, f"{self.who}: {site}")
            held = held_out_ratio(weight, solution, seen.held, options.positive) if seen.held.count else None
            report = LayerReport(
                site,
                str(task.scheme),
                seen.statistics.count,
                solution.objective / solution.nearest if solution.nearest > 0 else 1.0,
                held,
                solution.notes,
                scaled.told,
            )
            bias = self._bias(layer, weight, solution, seen)
            if bias is None and scaled.shift is not None:
                bias = layer.bias.detach().clone()  # type: ignore[union-attr, operator]
            moved = scaled.moved if number == 0 else {}
            fraction = None
            if tuned:
                found = solution.target, solution.grid, solution.codes, solution.hessian
                fraction = fraction_of(*found)
            solved[site] = Solved(solution.grid, solution.codes, bias, report, moved, fraction)
        if self.processes.several:
            shares = [from_bytes(share) for share in self.processes.from_all(to_bytes(solved))]
            solved = {site: one for site in tasks for share in shares if (one := share.get(site)) is not None}
        self._install(solved)
        for site, one in solved.items():
            for note in one.report.notes:
                logger.warning("%s: %s: %s", self.who, site, note)
        return solved

    def _install(self, solved: Mapping[str, Solved]) -> None:
        for site, one in solved.items():
            install(self.tasks[site].layers, one)
            for name, value in one.moved.items():
                self.model.get_parameter(name).copy_(value)
            self.layers.append(one.report)

    def _done(self, index: int) -> dict[str, Solved] | None:
        """Returns what the journal holds of a block; it is that of the first process."""
        found = self.journal.read(index) if self.processes.rank == 0 else None
        if not self.processes.several:
            return found
        data = self.processes.from_one(b"" if found is None else to_bytes(found))
        return from_bytes(data) if data else None

    def _stages(self, streams: Streams, block: Block, layers: Mapping[str, Rounded]) -> list[Stage]:
        """Returns the stages of a block, the same in every process, whichever of them saw a layer called."""
        own = find_stages(streams, block, layers)
        if not self.processes.several:
            return own
        told = self.processes.from_all(json.dumps([asdict(stage) for stage in own]).encode())
        stages: dict[str, Stage] = {}
        for one in sorted((one for text in told for one in json.loads(text)), key=lambda one: not one["calls"]):
            if not any(site in stage.sites for site in one["sites"] for stage in stages.values()):
                route = None if one["route"] is None else Route(**one["route"])
                stages[one["sites"][0]] = Stage(tuple(one["sites"]), one["calls"], route)
        return list(stages.values())

    def _bias(self, layer: Any, weight: Tensor, solution: Solution, seen: Seen) -> Tensor | None:
        """Returns the bias `[N]` that gives the outputs their float mean; None if there is none to move."""
        bias = getattr(layer, "bias", None)
        if not self.config.bias or bias is None or not seen.float_rows:
            return None
        groups = groups_of(layer)
        mean = (seen.float_sum / seen.float_rows).float()  # [groups, K]
        both = (weight.float(), mean), (solution.grid.values(solution.codes), seen.statistics.mean.float())
        want, got = (torch.einsum("gnk,gk->gn", w.view(groups, -1, w.shape[1]), m).flatten() for w, m in both)
        return (bias.detach().float() + want - got).to(bias.dtype)

    def _round_embeddings(self) -> bool:
        """Rounds the embeddings to nearest; says whether there are any."""
        embeddings = [task for task in self.tasks.values() if not task.by_data]
        for task in embeddings:
            grid = task.layer.weight_grid.grid
            codes = grid.codes(matrix_of(task.layer, task.layer.float_weight.detach()))
            install(task.layers, Solved(grid, codes, None, LayerReport(task.site, str(task.scheme), 0, 1.0, None)))
        return bool(embeddings)

    def _replay(self, streams: Streams, block: Block) -> Replay:
        """Returns what repeats outputs in the passes of a block: nothing where transforms change rounded layers."""
        layers = [layer for task in self.tasks.values() for layer in task.layers] if not self.transforms else []
        return Replay(self.model, block, layers, streams.store)

    def _advance(self, streams: Streams, block: Block, replay: Replay) -> None:
        """Moves the quantized stream behind the block, and measures how far it is from the float one there."""
        if streams.whole:
            return
        errors = BlockErrors()
        for number in range(len(self.batches)):
            with replay.running(number):
                output = streams.run_block(block, number, streams.quantized)
            replay.forget(number)
            assert output is not None
            if not bool(output.isfinite().all()):
                raise ValueError(f"{self.who}: what {block.name} returns must be finite, got NaN or Inf")
            if streams.floats is not None and number in (self.held_out or range(len(self.batches))):
                errors.update(streams.floats[number], output)
            streams.advance(number, output, floats=False)
        if errors.count:
            self.reports.append(errors.report(block.name))
