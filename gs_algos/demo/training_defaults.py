"""How each network is trained when nothing else is said: one table for the demo and the accuracy runs."""

from __future__ import annotations

from dataclasses import dataclass

from gs_algos.demo.data import ImageData, batches_per_epoch
from gs_algos.demo.train import Recipe


@dataclass(frozen=True)
class Habit:
    """lr: of the float run, for batches of 128. tune_lr: of the run that starts from a trained network."""

    lr: float
    tune_lr: float
    optimizer: str = "sgd"
    weight_decay: float = 5e-4


HABITS = {
    "lenet5": Habit(lr=0.05, tune_lr=0.005),
    "resnet20": Habit(lr=0.15, tune_lr=0.01),
    "resnet56": Habit(lr=0.15, tune_lr=0.01),
    "resnet18": Habit(lr=0.1, tune_lr=0.01),
    "mobilenetv2": Habit(lr=0.1, tune_lr=0.01),
    "mlp": Habit(lr=0.1, tune_lr=0.01),
    "vit-tiny": Habit(lr=1e-3, tune_lr=1e-4, optimizer="adamw", weight_decay=0.05),
}


OTHER = Habit(lr=0.05, tune_lr=0.005)  # of a network that is not ours


def habit_of(model: str) -> Habit:
    """How a network is trained, by the name it was asked for."""
    return HABITS.get(model, OTHER)


def batch_size_for(data: ImageData) -> int:
    """128, or less so that a small set still gives some twenty steps per epoch."""
    return max(8, min(128, 2 ** (len(data.train_x) // 20).bit_length() // 2))


def float_recipe(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> Recipe:
    """From a random network: a one-cycle schedule."""
    habit, batch = habit_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return Recipe(epochs, habit.lr, habit.optimizer, batch, 0.2, habit.weight_decay, seed=seed)


def tune_recipe(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> Recipe:
    """From a trained network: a cosine from a tenth of the rate, on other shuffles than the float run's."""
    habit, batch = habit_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return Recipe(epochs, habit.tune_lr, habit.optimizer, batch, 0.0, habit.weight_decay, seed=seed + 1)
