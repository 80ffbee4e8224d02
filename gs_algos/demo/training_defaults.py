"""How each network is trained when nothing else is said: one table for the demo and the accuracy runs."""

from __future__ import annotations

from dataclasses import dataclass

from gs_algos.demo.data import ImageData, batches_per_epoch
from gs_algos.demo.train import TrainConfig


@dataclass(frozen=True)
class TrainingDefaults:
    """lr: of the float run, for batches of 128. tune_lr: of the run that starts from a trained network."""

    lr: float
    tune_lr: float
    optimizer: str = "sgd"
    weight_decay: float = 5e-4


HABITS = {
    "lenet5": TrainingDefaults(lr=0.05, tune_lr=0.005),
    "resnet20": TrainingDefaults(lr=0.15, tune_lr=0.01),
    "resnet56": TrainingDefaults(lr=0.15, tune_lr=0.01),
    "resnet18": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "mobilenetv2": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "mlp": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "vit-tiny": TrainingDefaults(lr=1e-3, tune_lr=1e-4, optimizer="adamw", weight_decay=0.05),
}


OTHER = TrainingDefaults(lr=0.05, tune_lr=0.005)  # of a network that is not ours


def habit_of(model: str) -> TrainingDefaults:
    """How a network is trained, by the name it was asked for."""
    return HABITS.get(model, OTHER)


def batch_size_for(data: ImageData) -> int:
    """128, or less so that a small set still gives some twenty steps per epoch."""
    return max(8, min(128, 2 ** (len(data.train_x) // 20).bit_length() // 2))


def float_training(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> TrainConfig:
    """From a random network: a one-cycle schedule."""
    habit, batch = habit_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return TrainConfig(epochs, habit.lr, habit.optimizer, batch, 0.2, habit.weight_decay, seed=seed)


def tuning_training(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> TrainConfig:
    """From a trained network: a cosine from a tenth of the rate, on other shuffles than the float run's."""
    habit, batch = habit_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return TrainConfig(epochs, habit.tune_lr, habit.optimizer, batch, 0.0, habit.weight_decay, seed=seed + 1)
