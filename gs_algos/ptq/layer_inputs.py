"""Gathers what the layers of a stage see: of the float network first, then behind the layers that are rounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gs_algos.core.input_rows import groups_of, input_rows
from gs_algos.core.input_statistics import InputStatistics
from gs_algos.ptq.hessian import objective
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.processes import Processes
from gs_algos.ptq.routed import places_of
from gs_algos.ptq.solve import Solution
from gs_algos.ptq.stages import Stage
from gs_algos.ptq.transforms.stage import Scaled
from gs_algos.quant.packed.grid import grid_of
from gs_algos.quant.packed.packable import matrix_of


@dataclass
class Floats:
    """Holds what the float network showed of one block.

    Args:
        inputs: of the first layer of every stage: of each batch, call by call.
        places: which rows of its route's source these are; empty without one.
        block_inputs, outputs: of each batch, if the block is to be tuned; no inputs of the whole network.
    """

    inputs: dict[str, list[list[Tensor]]] = field(default_factory=lambda: defaultdict(list))
    places: dict[str, list[list[Tensor]]] = field(default_factory=lambda: defaultdict(list))
    block_inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def of(self, stage: Stage) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Returns inputs and places of a stage; nothing where there is no float stream."""
        return self.inputs[stage.first], self.places[stage.first]

    def kept(self) -> Iterator[Tensor]:
        """Yields what was given to the store."""
        yield from (tensor for batches in self.inputs.values() for batch in batches for tensor in batch)
        yield from self.block_inputs
        yield from self.outputs


class Seen:
    """Gathers what the layers of one stage see: statistics of most batches, and of those held out.

    Args:
        floats, places: what `Floats` holds of the stage.
        scaled: what transforms did to the input. It is not in the floats.
        means: whether the means of the floats are wanted, for biases.
    """

    def __init__(
        self,
        layer: Rounded,
        floats: list[list[Tensor]],
        places: list[list[Tensor]],
        cross: bool,
        scaled: Scaled,
        means: bool = True,
    ) -> None:
        self.layer, self.floats, self.places, self.scaled, self.means = layer, floats, places, scaled, means
        groups = groups_of(layer)
        columns = matrix_of(layer, layer.float_weight).shape[1]
        device = layer.float_weight.device
        self.statistics = InputStatistics(columns, groups, cross=cross and bool(floats), device=device)
        self.held = InputStatistics(columns, groups, device=device)
        self.float_sum = torch.zeros(groups, columns, dtype=torch.float64, device=device)
        self.float_rows = 0

    def update(
        self, number: int, inputs: Sequence[Tensor], places: Sequence[Tensor], mask: Tensor | None, held_out: bool
    ) -> None:
        """Adds what one batch showed the layer, call by call.

        places: which tokens the rows of each call are, if only some of them come to the layer; else empty.
        """
        for call, x in enumerate(inputs):
            place = places[call] if places else None
            rows = input_rows(self.layer, self.layer.seen(x), mask)
            floats = None if held_out else self._floats(number, call, mask, rows, place)
            if place is not None and mask is not None:
                counted = mask.flatten()[place]
                rows, floats = rows[counted], None if floats is None else floats[counted]
            if held_out:
                self.held.update(rows)
                continue
            self.statistics.update(rows, floats if self.statistics.cross is not None else None)
            if floats is not None and self.means:
                floats = floats if floats.dim() == 3 else floats.unsqueeze(0)
                self.float_sum += floats.sum(1, dtype=torch.float64)
                self.float_rows += floats.shape[1]

    def _floats(self, number: int, call: int, mask: Tensor | None, rows: Tensor, place: Tensor | None) -> Tensor | None:
        """Returns the rows of the float network, in the scale of these rows; None if there is no float stream.

        A token that a router sent elsewhere there counts as its own float.
        """
        if not self.floats:
            return None
        floats = self.floats[number]
        if call >= len(floats):
            return rows
        found = input_rows(self.layer, floats[call], mask)
        found = found if self.scaled.scale is None else found / self.scaled.scale
        found = found if self.scaled.shift is None else found - self.scaled.shift
        if place is None:
            return found if found.shape == rows.shape else rows
        at = places_of(place, self.places[number][call])
        return torch.where((at >= 0).unsqueeze(1), found[at], rows)

    def sum_over(self, processes: Processes) -> None:
        """Adds what the other processes saw."""
        for statistics in (self.statistics, self.held):
            statistics.all_reduce(processes.group)
        rows = torch.tensor([self.float_rows], device=self.float_sum.device)
        processes.add(self.float_sum)
        processes.add(rows)
        self.float_rows = int(rows)


def held_out_ratio(weight: Tensor, solution: Solution, held: InputStatistics, positive: bool) -> float:
    """Returns the objective of a solution over that of rounding to nearest, on rows that no statistic holds."""
    nearest = grid_of(weight, solution.grid.scheme, weight.dtype, positive=positive)
    rounded = solution.grid.values(solution.codes), nearest.values(nearest.codes(weight))
    ours, theirs = (objective(values - solution.target, held.gram) for values in rounded)
    return ours / theirs if theirs > 0 else 1.0
