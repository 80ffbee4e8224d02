"""Trains a network in a plain loop that can be stopped at any step and continued as if it had not been.

Everything that decides the next step is in the model, the optimizer and the position (epoch, batch): the learning rate
is a function of the position, and so are the order and the augmentation of the images (`train_batches`).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gs_algos.core.algorithm import Algorithm, Calibrates, evaluating
from gs_algos.core.files import write_atomically
from gs_algos.core.progress import progress
from gs_algos.demo.data import ImageData, batches_per_epoch, train_batches

FORMAT = "golden-stick-training"
VERSION = "1"
CALIBRATED = 1024  # images that an algorithm is calibrated on
CALIBRATION_BATCH = 64
SAVE_EVERY = 30.0  # seconds of training between two states, at ends of epochs


@dataclass(frozen=True)
class TrainConfig:
    """Says how a network is trained.

    Args:
        lr: the largest learning rate.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        warmup: share of all steps in which the rate rises from lr / 25 to lr; after it the rate falls as a cosine to 0.
        weight_decay: of weights; vectors (biases, norms, learned steps) are not decayed.
        amp: run the forward under bfloat16 autocast.
        seed: of the order and augmentation of the images.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    batch_size: int = 128
    warmup: float = 0.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"TrainConfig: epochs must be >= 0, got {self.epochs}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"TrainConfig: optimizer must be sgd or adamw, got {self.optimizer!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"TrainConfig: warmup must be in [0, 1), got {self.warmup}")


class Interrupted(RuntimeError):
    """Says that the user stopped a training after a whole step; what was done is saved if a state file was given."""


def train(
    model: nn.Module,
    data: ImageData,
    training: TrainConfig,
    *,
    algorithm: Algorithm | None = None,
    state: Path | None = None,
    resume: bool = False,
    compiled: bool = False,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> float:
    """Trains the live model; returns the seconds that the steps took, over all runs that were resumed.

    Args:
        data: on the model's device.
        algorithm: whose `loss` is used and whose `step` is called after each optimizer step. One that does not train is
            calibrated on training images instead, and one that starts better from data is so before the first step.
        state: file that holds the training state: at the end, after an interrupt, and every half a minute or epoch.
        resume: continue from `state` if it is there; the result is that of an uninterrupted run, bit for bit.
        compiled: run the forward through torch.compile.
        on_step: called with (steps done, steps in all, loss of this step, still on the device).

    Raises:
        ValueError: if `state` was written with another TrainConfig or for another network, or is damaged.
        Interrupted: after Ctrl-C (SIGINT); a second one stops at once, without saving.
    """
    if algorithm is not None and not algorithm.trains:
        return _calibrate(model, data, algorithm)
    optimizer = make_optimizer(model, training)
    per_epoch = batches_per_epoch(data, training.batch_size)
    total = training.epochs * per_epoch
    done, before = 0, 0.0
    if resume and state is not None and state.is_file():
        done, before = load_state(state, model, optimizer, training, algorithm)
    saved = time.perf_counter()
    started = saved - before
    if algorithm is not None and algorithm.calibrate_first and not done:
        _calibrate(model, data, algorithm)
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
    loss_fn = loss_fn if algorithm is None else algorithm.loss(loss_fn)
    forward = torch.compile(model) if compiled else model
    device = data.train_x.device.type
    model.train()
    with interrupts() as interrupted:
        while done < total:
            epoch, start = divmod(done, per_epoch)
            for x, target in train_batches(data, training.batch_size, training.seed, epoch, start):
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(training, done, total)
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16, enabled=training.amp):
                    loss = loss_fn(forward(x), target)
                loss.backward()
                optimizer.step()
                if algorithm is not None:
                    algorithm.step()
                done += 1
                if on_step is not None:
                    on_step(done, total, loss.detach())
                if interrupted():
                    break
            saves = done == total or interrupted() or time.perf_counter() > saved + SAVE_EVERY
            if state is not None and saves:
                saved = time.perf_counter()
                save_state(state, model, optimizer, training, done, time.perf_counter() - started)
            if interrupted() and done < total:
                kept = "nothing is saved" if state is None else f"saved in {state}"
                raise Interrupted(f"train: stopped after {done} of {total} steps; {kept}")
    return time.perf_counter() - started


def _calibrate(model: nn.Module, data: ImageData, algorithm: Algorithm) -> float:
    """Calibrates on training images as they are; returns the seconds it took."""
    assert isinstance(algorithm, Calibrates)
    started = time.perf_counter()
    algorithm.calibrate(model, data.normalize(data.train_x[:CALIBRATED]).split(CALIBRATION_BATCH))
    return time.perf_counter() - started


def lr_at(training: TrainConfig, step: int, total: int) -> float:
    """Returns the learning rate of a step: a linear rise over the warm-up share of `total`, then half a cosine to 0."""
    rise = training.warmup * total
    if step < rise:
        return training.lr * (1 + 24 * step / rise) / 25
    return training.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def make_optimizer(model: nn.Module, training: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, training.lr)
    return torch.optim.SGD(groups, training.lr, momentum=0.9, nesterov=True)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Makes the first SIGINT inside only turn the yielded function True; the second raises KeyboardInterrupt."""
    asked = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainConfig, done: int, seconds: float
) -> None:
    """Writes model and optimizer into one safetensors file, whose header has position and TrainConfig as JSON."""
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    header = {"format": FORMAT, "version": VERSION, "recipe": json.dumps(asdict(training)), "steps": str(done)}
    header["seconds"] = f"{seconds:.1f}"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_atomically(path, to_bytes(whole, header))


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainConfig, algorithm: Algorithm | None
) -> tuple[int, float]:
    """Fills model, optimizer and the algorithm's step count from a `save_state` file: (steps, seconds) so far."""
    header, tensors = read_state(path)
    theirs, ours = json.loads(header["recipe"]), asdict(training)
    differs = [f"{key}={theirs.get(key)!r}, got {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if differs:
        raise ValueError(f"train: {path} must be of the same TrainConfig, it was written with {'; '.join(differs)}")
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, slot = rest.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
    fill_model(model, tensors, path)
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    done = int(header["steps"])
    if algorithm is not None:
        algorithm.steps = done
    return done, float(header["seconds"])


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads (header, tensors) from a file of `save_state`.

    Raises:
        ValueError: if it is not one, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"train: {path} must be a whole safetensors file, got {error}; delete it to start over"
        ) from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        got = f"{header.get('format')!r} version {header.get('version')!r}"
        raise ValueError(f"train: {path} must be of format {FORMAT!r} version {VERSION}, got {got}")
    return header, tensors


def fill_model(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads the `model.` tensors of a training state, in place."""
    weights = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"train: {path} must be of the same network, got: {' '.join(str(error).split())}") from error


def predict(model: nn.Module, data: ImageData, batch_size: int = 500) -> Tensor:
    """Computes logits `[N, classes]` fp32 of the test set, on the CPU, in eval mode."""
    with evaluating(model):
        batches = progress(data.test_x.split(batch_size), "evaluating")
        return torch.cat([model(data.normalize(x)).float().cpu() for x in batches])


def accuracy(logits: Tensor, data: ImageData) -> float:
    """Returns the percent of the test images whose largest logit is their label."""
    return 100 * (logits.argmax(1) == data.test_y.cpu()).double().mean().item()
