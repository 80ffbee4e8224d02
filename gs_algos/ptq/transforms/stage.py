"""Scales the input of one stage by the transforms that were asked for, where a layer before can take the scale back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import evaluating
from gs_algos.core.input_rows import input_rows
from gs_algos.ptq.blocks import Block, first_tensor
from gs_algos.ptq.journal import Solved
from gs_algos.ptq.layers import Rounded, Task, install
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.stages import Stage, input_of, inputs_of
from gs_algos.ptq.streams import Streams, stop, without_cache
from gs_algos.ptq.transforms import StageTransform
from gs_algos.ptq.transforms.columns import StageColumns
from gs_algos.ptq.transforms.producer import (
    Producer,
    divide_output,
    find_producer,
    multiply_input,
    restored,
    shift_output,
)
from gs_algos.quant.packed.grid import grid_of, group_size, stored_dtype
from gs_algos.quant.packed.packable import matrix_of
from gs_kernels import PerTensor

ROWS = 2048  # that the error of a candidate is measured on, at least where there are so many
NOT_SCALED = "not scaled"
AS_IT_IS = "best left as it is"
Run: TypeAlias = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Scaled:
    """Says what became of a stage.

    Args:
        scale: `[K]`, by which the stage's input is divided now; None if it is as it was.
        shift: `[K]`, what is taken off the quotient; None for nothing.
        told: what a report should say.
        moved: parameters of float layers that changed, by name.
        solved: layers that were rounded already and whose rows were scaled.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    told: tuple[str, ...] = ()
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    solved: Mapping[str, Solved] = field(default_factory=dict)


@dataclass(frozen=True)
class StageScaler:
    """Scales one stage of a block. `run` does it once.

    Args:
        tasks: of the stage.
        masks: of the tokens that count, one for each batch of the streams.
        numbers: of the batches that enter statistics.
        solved: what was found for the layers of the block so far.
        float_network: gives a context in which all layers that are not rounded yet are float.
    """

    model: nn.Module
    streams: Streams
    block: Block
    stage: Stage
    tasks: Mapping[str, Task]
    masks: Sequence[Tensor | None]
    numbers: Sequence[int]
    solved: Mapping[str, Solved]
    float_network: Callable[[], AbstractContextManager[None]]
    processes: Processes

    @property
    def sinks(self) -> dict[str, Rounded]:
        return {site: task.layer for site, task in self.tasks.items()}

    def run(self, transforms: Mapping[str, tuple[StageTransform, float | None]]) -> Scaled:
        """Applies the transforms one after the other and returns what came of it."""
        if self.stage.calls != 1:
            why = "no batch reaches it" if not self.stage.calls else "it is called more than once"
            return Scaled(told=(f"{NOT_SCALED}: {why}",) if self.stage.calls else ())
        producer = self._producer()
        if isinstance(producer, str):
            return Scaled(told=(f"{NOT_SCALED}: {producer}",))
        absmax, absmean, low, high, sample = self._inputs()
        if not bool(absmax.isfinite().all()):
            return Scaled()  # the statistics will say which columns are not
        total, shift = torch.ones_like(absmax), None
        shifts = producer.norm and all(
            one._parameters.get("bias") is not None
            for one in (self.model.get_submodule(producer.name), *self.sinks.values())
        )
        told = []
        for label, (transform, number) in transforms.items():
            if transform.norms and not producer.norm:
                told.append(f"{label}: no norm makes it")
                continue
            weights = tuple(
                matrix_of(layer, layer.float_weight.detach()).float().clone() for layer in self.sinks.values()
            )
            sizes = tuple(group_size(task.scheme, len(absmax)) for task in self.tasks.values())
            scaled = absmax / total, absmean / total, low / total, high / total
            columns = StageColumns(*scaled, shifts, weights, sizes)
            candidates = transform.candidates(columns, number)
            name, scale = self._best(candidates, transform.by_block, sample, weights)
            own = transform.shift(columns, scale) if transform.shift is not None and shifts else None
            if name != AS_IT_IS and self._apply(producer, scale, own):
                total, shift = total * scale, own
                told.append(f"{label} {name}, {producer.name}")
            else:
                told.append(f"{label}: {AS_IT_IS}")
        if bool((total == 1).all()) and shift is None:
            return Scaled(told=tuple(told))
        module = self.model.get_submodule(producer.name)
        if producer.name in self.solved:
            return Scaled(total, told=tuple(told), solved={producer.name: self._divided(producer.name, total)})
        moved = {f"{producer.name}.{key}": p.detach().clone() for key, p in module.named_parameters(recurse=False)}
        return Scaled(total, shift, tuple(told), moved)

    def _producer(self) -> Producer | str:
        """Returns what the first process finds."""
        if self.processes.rank == 0:
            found = find_producer(
                self.model, self.streams, self.block, self.sinks, self._rows_are_free, self.float_network
            )
            told = found if isinstance(found, str) else [found.name, found.offset, found.norm]
        else:
            told = ""
        told = json.loads(self.processes.from_one(json.dumps(told).encode()))
        return told if isinstance(told, str) else Producer(*told)

    def _rows_are_free(self, module: nn.Module, name: str) -> bool:
        """Says whether the rows of a linear may be scaled: of a float one, or codes found in this block, row by row."""
        if name in self.solved:
            return not isinstance(self.solved[name].grid.scheme.granularity, PerTensor)
        return not hasattr(module, "solved")

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """Returns max|x|, mean|x|, min x and max x `[K]` of the stage's input, and the batches that errors are of."""
        layer = self.tasks[self.stage.first].layer
        k = matrix_of(layer, layer.float_weight).shape[1]
        where = layer.float_weight.device
        extremes = torch.full((2, k), -torch.inf, dtype=torch.float32, device=where)  # of -x, and of x
        total, count = torch.zeros_like(extremes[0], dtype=torch.float64), torch.zeros(1, device=extremes.device)
        sample: list[int] = []
        for number in self.numbers:
            enough = int(count) >= ROWS
            for x in inputs_of(self.streams, self.block, number, layer, self.stage.calls)[0]:
                rows = input_rows(layer, x, self.masks[number]).float()
                if len(rows):
                    extremes = torch.maximum(extremes, torch.stack([-rows.amin(0), rows.amax(0)]))
                    total += rows.abs().sum(0, dtype=torch.float64)
                    count += len(rows)
            if not enough:
                sample.append(number)
        self.processes.largest(extremes)
        self.processes.add(total)
        self.processes.add(count)
        low, high = torch.where(count > 0, -extremes[0], 0.0), torch.where(count > 0, extremes[1], 0.0)
        return torch.maximum(-low, high), (total / count.clamp(min=1)).float(), low, high, sample

    def _best(
        self, candidates: Mapping[str, Tensor], by_block: bool, sample: Sequence[int], weights: Sequence[Tensor]
    ) -> tuple[str, Tensor]:
        """Returns the candidate with the least error of the output, of one that alone."""
        if len(candidates) == 1:
            return next(iter(candidates.items()))
        every = {AS_IT_IS: torch.ones_like(weights[0][0]), **candidates}
        acts = {site: layer.act for site, layer in self.sinks.items()}
        errors = torch.zeros(len(every), dtype=torch.float64, device="cpu")
        with self.float_network(), restored(self.sinks.values()), evaluating(self.model), without_cache(self.model):
            runs = [self._run_of(number, by_block) for number in sample]
            want = [run() for run in runs]
            for i, scale in enumerate(every.values()):
                with self._rounded(scale, weights, acts):
                    for number, run, floats in zip(sample, runs, want, strict=True):
                        errors[i] += self._error(run(), floats, self.masks[number])
        device = weights[0].device
        errors = errors.to(device)
        self.processes.add(errors)
        best = int(torch.where(errors.isfinite(), errors, torch.inf).argmin())
        return list(every.items())[best]

    def _run_of(self, number: int, by_block: bool) -> Run:
        """Returns what computes the output that counts for one batch, from the quantized stream."""
        whole = lambda: self.streams.run_block(self.block, number, self.streams.quantized)  # noqa: E731
        if by_block:
            return whole
        names = [name for name in _above(list(self.tasks)) if name and self.block.holds(name)]
        found: dict[str, Any] = {}
        handles = []

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                found.setdefault(name, (module, args, kwargs))
                if name in self.tasks:
                    stop()

            return hook

        for name in names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        try:
            whole()
        finally:
            for handle in handles:
                handle.remove()
        smallest = next((found[name] for name in names if name in found), None)
        if smallest is None:
            return whole
        module, args, kwargs = smallest
        return lambda: first_tensor(module(*args, **kwargs))

    @contextmanager
    def _rounded(self, scale: Tensor, weights: Sequence[Tensor], acts: Mapping[str, str | None]) -> Iterator[None]:
        """Lets the sinks multiply what they would if their input were divided by the scale, rounded."""
        handles = []
        for (site, task), weight in zip(self.tasks.items(), weights, strict=True):
            layer = task.layer
            grid = grid_of(weight * scale, task.scheme, layer.float_weight.dtype)
            values = grid.values(grid.codes(weight * scale)) / scale
            matrix_of(layer, layer.float_weight.detach()).copy_(values)
            if acts[site] is not None:
                handles.append(layer.register_forward_pre_hook(_rounding_rows(acts[site], scale), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _error(got: Tensor | None, want: Tensor | None, mask: Tensor | None) -> float:
        if got is None or want is None:
            return 0.0
        difference = got.float() - want.float()
        if mask is not None and mask.shape == difference.shape[:-1]:
            difference = difference[mask]
        return float(difference.double().square().sum())

    def _apply(self, producer: Producer, scale: Tensor, shift: Tensor | None) -> bool:
        """Scales the stage's float weights and what makes their input; says whether they stay finite."""
        module = self.model.get_submodule(producer.name)
        changed: list[nn.Module] = [module, *self.sinks.values()]
        before = [p.detach().clone() for one in changed for p in one.parameters(recurse=False)]
        divide_output(module, scale, producer.offset)
        for layer in self.sinks.values():
            multiply_input(layer, scale)
        if shift is not None:
            shift_output(module, self.sinks.values(), shift)
        now = [p for one in changed for p in one.parameters(recurse=False)]
        if all(bool(p.isfinite().all()) for p in now):
            return True
        for parameter, value in zip(now, before, strict=True):
            parameter.copy_(value)
        return False

    def _divided(self, name: str, scale: Tensor) -> Solved:
        """Returns the codes of a layer whose output is divided: those that it has, with other scales."""
        one = self.solved[name]
        layer: Any = self.model.get_submodule(name)
        scales = one.grid.scale / scale.unsqueeze(1)
        dtype = one.grid.dtype if one.grid.dtype == torch.float32 else stored_dtype(one.grid.dtype, scales)
        grid = replace(one.grid, scale=scales.to(dtype).float(), dtype=dtype)
        bias = getattr(layer, "bias", None)  # divided already
        new = replace(one, grid=grid, bias=None if bias is None else bias.detach().clone())
        install([layer], new)
        return new


def _above(sites: Sequence[str]) -> list[str]:
    """Returns the names of the modules that hold all sites, the smallest first: a single site itself."""
    parts = [site.split(".") for site in sites]
    common = 0
    while all(len(part) > common and part[common] == parts[0][common] for part in parts):
        common += 1
    return [".".join(parts[0][:end]) for end in range(common, -1, -1)]


def _rounding_rows(act: str | None, scale: Tensor) -> Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Returns a hook that rounds the rows of a layer as if its input were divided by the scale."""

    def hook(layer: Any, args: Any, kwargs: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        before, layer.act = layer.act, act
        try:
            return (layer.seen(input_of(args, kwargs) / scale) * scale,), {}
        finally:
            layer.act = before

    return hook
