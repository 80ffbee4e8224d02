"""Tunes the codes of a block by gradient, all its layers together, on what the block returns.

The block reads the quantized stream; what it returns is held to the float stream behind it. A step sees whole batches,
as many as make 8 samples. What is tuned is compared on a held-out batch, always the same, every twentieth of the steps:
the best is taken, and the codes it started from are one of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gs_algos.ptq.blocks import Block
from gs_algos.ptq.journal import Solved
from gs_algos.ptq.layers import Task
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.rounding import TUNED
from gs_algos.ptq.streams import Streams
from gs_algos.quant.packed.grid import Grid
from gs_algos.quant.packed.packable import matrix_of

SAMPLES = 8  # of a step, and of the comparison
COMPARISONS = 20
FEW_BITS = 4  # below which the largest errors stay out of the loss
LARGEST_ERRORS = 1e-3  # share of them
SAME = 1e-5  # relative difference of two sums over the same batch


@dataclass
class BlockTuner:
    """Tunes the layers of one block that have the same rounding. `run` does it once.

    Args:
        inputs: of the block in the float network, one a batch; only read where the rounding mixes both streams.
        outputs: of the block in the float network, one a batch.
        tasks: of the layers, by site.
        solved: what was found for them, with fractions.
        masks: of the tokens that count, one for each batch.
        held_out: numbers of the batches that are for the comparison; none if there is only one batch.
        seed: of the order of batches and of the mixture.
        advance: is told the share of the steps that are done.
    """

    streams: Streams
    block: Block
    index: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    tasks: Mapping[str, Task]
    solved: Mapping[str, Solved]
    masks: Sequence[Tensor | None]
    held_out: Sequence[int]
    steps: int | None
    lr: float | None
    processes: Processes
    advance: Callable[[float], None]
    who: str

    def run(self) -> dict[str, Solved]:
        """Returns what was found for each layer: with a loss on the held-out batch that is at most that of the start.

        Raises:
            ValueError: with the name of the block, if its loss is not finite.
        """
        rounding = TUNED[next(iter(self.tasks.values())).rounding]
        steps = rounding.STEPS if self.steps is None else self.steps
        tuned = {
            site: rounding(one.grid, one.codes, one.fraction, steps, self.lr)
            for site, one in self.solved.items()
            if one.fraction is not None
        }
        generator = torch.Generator().manual_seed(self.index)
        numbers = [n for n in range(len(self.outputs)) if n not in self.held_out] or list(range(len(self.outputs)))
        compared = next(self._groups(self.held_out or numbers, None))
        found = {site: (one.grid, one.codes) for site, one in self.solved.items()}
        start = least = self._compare(found, compared)
        for probe in range(rounding.PROBES):
            for one, gradient in zip(
                tuned.values(), self._probe(numbers[probe % len(numbers)], generator), strict=True
            ):
                one.observe(gradient)
        groups = self._groups(numbers, generator)
        for step in range(steps):
            self._set({site: one.values() for site, one in tuned.items()})
            gradients = self._gradients(next(groups), generator if rounding.MIXES else None)
            for one, gradient in zip(tuned.values(), gradients, strict=True):
                one.step(gradient)
            if (step + 1) * COMPARISONS // steps > step * COMPARISONS // steps:
                candidate = {site: one.rounded() for site, one in tuned.items()}
                loss = self._compare(candidate, compared)
                if loss < least:
                    found, least = candidate, loss
            self.advance(1 / steps)
        least = self._compare(found, compared)
        assert least <= start * (1 + SAME), (least, start)
        ratio = least / start if start > 0 else 1.0
        return {site: self._result(site, *pair, ratio) for site, pair in found.items()}

    def _result(self, site: str, grid: Grid, codes: Tensor, ratio: float) -> Solved:
        one = self.solved[site]
        return replace(one, grid=grid, codes=codes, fraction=None, report=replace(one.report, tuned=ratio))

    def _groups(self, numbers: Sequence[int], generator: torch.Generator | None) -> Iterator[list[int]]:
        """Yields batches that make 8 samples, or all there are; in a random order if there is a generator."""
        group: list[int] = []
        while True:
            count = len(numbers)
            order = range(count) if generator is None else torch.randperm(count, generator=generator, device="cpu")
            for number in (numbers[int(i)] for i in order):
                group.append(number)
                samples = sum(len(self.outputs[n]) if self.outputs[n].dim() else 1 for n in group)
                if samples >= SAMPLES or len(group) == len(numbers):
                    yield group
                    group = []

    def _set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for site, rows in values.items():
                layer = self.tasks[site].layer
                layer.float_weight.copy_(layer.in_shape(rows))

    def _compare(self, candidate: Mapping[str, tuple[Grid, Tensor]], numbers: Sequence[int]) -> float:
        """Returns the mean squared error of the block with these codes."""
        self._set({site: grid.values(codes) for site, (grid, codes) in candidate.items()})
        device = next(iter(self.tasks.values())).layer.float_weight.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for number in numbers:
            got = self.streams.output_of(self.block, number, self._input(number))
            total += torch.stack([part.double() for part in self._errors(got, number)])
        self.processes.add(total)
        return self._finite(float(total[0] / total[1].clamp(min=1)))

    def _gradients(self, numbers: Sequence[int], mixes: torch.Generator | None) -> list[Tensor]:
        """Returns the gradients `[N, K]` fp32 of the mean squared error by the weights of the layers."""

        def loss(number: int) -> tuple[Tensor, Tensor]:
            x = self._input(number) if mixes is None else self._mixed(number, mixes)
            return self._errors(self.streams.output_of(self.block, number, x, gradients=True), number)

        totals, loss_sum, count = self._summed(numbers, loss)
        self._finite(float(loss_sum))
        return [total / count for total in totals]

    def _probe(self, number: int, generator: torch.Generator) -> list[Tensor]:
        """Returns the gradients `[N, K]` of `sum(v y) / sqrt(elements)`, v = ±1 at random."""

        def loss(number: int) -> tuple[Tensor, Tensor]:
            got = self._counted(self.streams.output_of(self.block, number, self._input(number), gradients=True), number)
            signs = torch.randint(0, 2, got.shape, generator=generator, device="cpu").to(got.device) * 2 - 1
            return (got * signs).sum(), got.new_tensor(got.numel())

        totals, _, count = self._summed([number], loss)
        return [total / count.sqrt() for total in totals]

    def _summed(
        self, numbers: Sequence[int], loss: Callable[[int], tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Returns sums over batches and processes: of the gradients `[N, K]` of a loss, of the loss, of its count."""
        layers = [task.layer for task in self.tasks.values()]
        weights = [layer.float_weight for layer in layers]
        before = [weight.requires_grad for weight in weights]
        totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        sums = torch.zeros(2, dtype=torch.float32, device=weights[0].device)
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for number in numbers:
                with torch.enable_grad():
                    error, count = loss(number)
                if error.requires_grad:
                    for total, part in zip(totals, torch.autograd.grad(error, weights, allow_unused=True), strict=True):
                        if part is not None:
                            total += part
                sums += torch.stack([error.detach(), count])
        finally:
            for weight, required in zip(weights, before, strict=True):
                weight.requires_grad_(required)
        for t in (*totals, sums):
            self.processes.add(t)
        rows = [matrix_of(layer, total).contiguous() for layer, total in zip(layers, totals, strict=True)]
        return rows, sums[0], sums[1].clamp(min=1)

    def _errors(self, got: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        """Returns the sum of the squared errors of the elements that count, and their number, fp32."""
        difference = self._counted(got, number) - self._counted(self.outputs[number], number)
        count = difference.new_tensor(difference.numel())
        left_out = int(difference.numel() * LARGEST_ERRORS) if self._few_bits else 0
        if left_out:
            most = difference.detach().abs().flatten().topk(left_out).values[-1]
            difference = difference.masked_fill(difference.detach().abs() >= most, 0.0)
        return difference.square().sum(), count

    def _counted(self, output: Tensor | None, number: int) -> Tensor:
        """Returns the rows of an output that count, fp32."""
        assert output is not None
        mask = self.masks[number]
        return (output[mask] if mask is not None and mask.shape == output.shape[:-1] else output).float()

    @property
    def _few_bits(self) -> bool:
        return min(task.scheme.bits for task in self.tasks.values()) < FEW_BITS

    def _input(self, number: int) -> Tensor | None:
        return None if self.streams.whole else self.streams.quantized[number]

    def _mixed(self, number: int, generator: torch.Generator) -> Tensor | None:
        """Returns the block's input, each element of it from either stream (QDrop, arXiv:2203.05740)."""
        x = self._input(number)
        if x is None or not self.inputs:
            return x
        quantized = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device) < 0.5
        return torch.where(quantized, x, self.inputs[number])

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise ValueError(
                f"{self.who}: the error of what {self.block.name or 'the network'} returns must be finite, got {loss}; "
                "run the float network on the data and look there"
            )
        return loss
