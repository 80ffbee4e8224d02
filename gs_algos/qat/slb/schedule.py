"""Schedules the temperature of a search: a pure function of the step, so that a resumed run continues exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

# the rise of T that Golden Stick's CIFAR-10 defaults reach in 300 epochs: 1.2 ** 40
T_FINAL = 1470.0


@dataclass(frozen=True)
class Schedule:
    """Schedules T = 1 / temperature over the optimizer steps; see `SLBConfig` for the fields."""

    total_steps: int
    steps_per_epoch: int = 1
    t0: float = 1.0
    t_start: float = 0.2
    t_end: float = 0.6
    t_factor: float | None = None
    t_final: float = T_FINAL

    @property
    def one_hot_step(self) -> int:
        """Returns the steps after which the codes are chosen."""
        return math.ceil(self.t_end * self.total_steps)

    def one_hot(self, steps: int) -> bool:
        return steps >= self.one_hot_step

    def temperature(self, steps: int) -> float:
        """Returns the temperature after `steps` optimizer steps; 0 once the codes are chosen."""
        if self.one_hot(steps):
            return 0.0
        epoch, epochs = steps // self.steps_per_epoch, self.total_steps / self.steps_per_epoch
        first, last = math.floor(self.t_start * epochs), math.ceil(self.t_end * epochs)
        factor = self.t_factor
        if factor is None:
            factor = (self.t_final / self.t0) ** (1 / max(1, last - first))
        return 1 / (self.t0 * factor ** max(0, epoch - first))

    def point(self, steps: int, points: int) -> int | None:
        """Returns the row of a trace of `points` rows to write after `steps` steps, if any; the last one at the end."""
        if points == 0 or steps > self.total_steps:
            return None
        due, before = (n * (points - 1) // self.total_steps for n in (steps, steps - 1))
        return due if due > before else None
