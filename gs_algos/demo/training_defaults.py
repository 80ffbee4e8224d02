"""Has the training options of each network, where the user gives none: one table for demo and accuracy runs."""

from __future__ import annotations

from dataclasses import dataclass

from gs_algos.demo.data import ImageData, batches_per_epoch
from gs_algos.demo.train import TrainConfig


@dataclass(frozen=True)
class TrainingDefaults:
    """Holds the options of a network. lr: of the float run, for batches of 128; tune_lr: of a trained network's."""

    lr: float
    tune_lr: float
    optimizer: str = "sgd"
    weight_decay: float = 5e-4


DEFAULTS = {
    "lenet5": TrainingDefaults(lr=0.05, tune_lr=0.005),
    "lenet5-bn": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "resnet20": TrainingDefaults(lr=0.15, tune_lr=0.01),
    "resnet56": TrainingDefaults(lr=0.15, tune_lr=0.01),
    "resnet18": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "mobilenetv2": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "ghostnet": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "mlp": TrainingDefaults(lr=0.1, tune_lr=0.01),
    "vit-tiny": TrainingDefaults(lr=1e-3, tune_lr=1e-4, optimizer="adamw", weight_decay=0.05),
}
FALLBACK = TrainingDefaults(lr=0.05, tune_lr=0.005)  # of a network that is not ours


def defaults_of(model: str) -> TrainingDefaults:
    """Returns the options of a network by its name."""
    return DEFAULTS.get(model, FALLBACK)


def batch_size_for(data: ImageData) -> int:
    """Returns 128, or less so that a small set still gives some twenty steps per epoch."""
    return max(8, min(128, 2 ** (len(data.train_x) // 20).bit_length() // 2))


def float_training(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> TrainConfig:
    """Makes the config of training from random weights: a one-cycle schedule."""
    defaults, batch = defaults_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return TrainConfig(epochs, defaults.lr, defaults.optimizer, batch, 0.2, defaults.weight_decay, seed=seed)


def tuning_training(model: str, data: ImageData, epochs: int, seed: int, batch_size: int | None = None) -> TrainConfig:
    """Makes the config of tuning a trained network: a cosine from `tune_lr`, on other shuffles than the float run's."""
    defaults, batch = defaults_of(model), batch_size_for(data) if batch_size is None else batch_size
    batches_per_epoch(data, batch)
    return TrainConfig(epochs, defaults.tune_lr, defaults.optimizer, batch, 0.0, defaults.weight_decay, seed=seed + 1)
