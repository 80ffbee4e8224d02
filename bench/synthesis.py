"""Distills and calibrates without data, and records what that gave: `python -m bench.synthesis --model lenet5 ...`.

A float network is trained on data. Then a generator is trained against it, and a new student of the same kind on its
images alone, `--replay` batches a step; an equal student sees as many batches of noise. The float network is also
calibrated by PTQ on images of the data, of the generator, and on noise. Accuracies are of the last step, on the whole
test set. A row is recorded every `--every` steps, so that a run that is cut leaves what it had.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.accuracy import first_images
from gs_algos import PTQ, Distill, Synthesis
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.train import accuracy, predict, train
from gs_algos.demo.training_defaults import float_training

SCHEMES = {"w8a8": "int8@channel", "w4a8": "int4@channel:mse"}
DAFL: dict[str, Any] = {"one_hot": 1.0, "statistics": 0.0, "adversarial": 0.0}
STUDENT_LR, WARMUP = 5e-3, 0.1  # of Adam; share of its steps in which the rate rises


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.synthesis", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="lenet5")
    parser.add_argument("--data", default="mnist", help="as golden-stick demo --data")
    parser.add_argument("--train-images", type=int, metavar="N", help="train the float network on the first N only")
    parser.add_argument("--test-images", type=int, metavar="N", help="test on the first N only, where time is short")
    parser.add_argument("--float-epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000, help="of generator and student")
    parser.add_argument("--every", type=int, default=500, help="steps between two rows")
    parser.add_argument("--loss", choices=("dafl", "default"), default="default")
    parser.add_argument("--replay", type=int, default=4, help="batches for the student a step, earlier images too")
    parser.add_argument("--width", type=int, default=64, help="channels of the generator")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("build/accuracy"), help="where training states are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    for name in ("float_epochs", "steps", "every", "replay"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    try:
        data = first_images(load_data(args.data), args.train_images, args.test_images).to(torch.device(args.device))
        for row in measure(args, data):
            print(f"recorded in {record.append(row, kind='synthesis', device=args.device)}", flush=True)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace, data: ImageData) -> Any:
    """Yields a row every so many steps."""

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build(args.model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
        return net.to(data.train_x.device)

    teacher = fresh(args.seed)
    config = float_training(args.model, data, args.float_epochs, args.seed)
    count = f"-{args.train_images}" if args.train_images else ""
    state = args.state / f"{args.model}-{args.data.partition(':')[0]}{count}-s{args.seed}-float{args.float_epochs}"
    train(teacher, data, config, state=state.with_suffix(".safetensors"), resume=True)
    found = {"float": accuracy(predict(teacher, data), data)}
    print(f"float: {found['float']:.2f} %", flush=True)
    shape = (data.channels, data.image_size, data.image_size)
    weights = DAFL if args.loss == "dafl" else {}
    images = Synthesis(teacher, shape, width=args.width, batch_size=args.batch_size, seed=args.seed, **weights)
    students = {name: Student(fresh(args.seed + 1), teacher, shape, args) for name in ("student", "noise")}
    noise = torch.Generator().manual_seed(args.seed)
    seen = data.normalize(data.train_x[: args.batch_size])
    for step in range(1, args.steps + 1):
        images.step(students["student"].net)
        for x in images.replay(args.replay):
            students["student"].step(x)
            students["noise"].step(torch.randn(args.batch_size, *shape, generator=noise).to(seen.device))
        if step % args.every and step != args.steps:
            continue
        entropy = images.check()
        found |= {name: accuracy(predict(student.net, data), data) for name, student in students.items()}
        found |= calibrated("data", teacher, data, [seen])
        found |= calibrated("synthetic", teacher, data, images.batches(1))
        found |= calibrated("noise", teacher, data, [torch.randn(seen.shape, generator=noise).to(seen.device)])
        print({"step": step, **{key: round(value, 2) for key, value in found.items()}}, flush=True)
        keys = ("model", "train_images", "float_epochs", "loss", "width", "batch_size", "replay", "temperature", "seed")
        told = {key: getattr(args, key) for key in keys}
        yield {**told, "data": data.name, "steps": step, "of": args.steps, "entropy": entropy, "accuracy": dict(found)}


class Student:
    """Trains a network on images by its teacher's answers, by Adam; its rate rises, then falls to 0 by a cosine."""

    def __init__(self, net: nn.Module, teacher: nn.Module, shape: tuple[int, ...], args: argparse.Namespace) -> None:
        self.algo = Distill(None, teacher, labels=0.0, logits=1.0, temperature=args.temperature)
        self.net = self.algo.apply(net, torch.zeros(2, *shape, device=next(net.parameters()).device))
        self.optimizer = torch.optim.Adam(self.net.parameters(), STUDENT_LR)
        self.loss: Callable[..., Tensor] = self.algo.loss(nn.functional.cross_entropy)
        self.steps = args.steps * args.replay

    def step(self, x: Tensor) -> None:
        done = self.algo.steps / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = STUDENT_LR * min(1, (done + 1 / self.steps) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        self.optimizer.zero_grad()
        self.loss(self.net.train()(x), None).backward()
        self.optimizer.step()
        self.algo.step()


def calibrated(name: str, teacher: nn.Module, data: ImageData, batches: list[Tensor]) -> dict[str, float]:
    """Returns the accuracy of the float network calibrated on these images, by scheme."""
    found = {}
    for scheme, weight in SCHEMES.items():
        algo = PTQ(weight=weight, act="int8@tensor")
        net = algo.apply(copy.deepcopy(teacher).eval(), data.example())
        algo.calibrate(net, [part for batch in batches for part in batch.split(64)])
        found[f"{scheme} on {name}"] = accuracy(predict(algo.convert(net, data.example()), data), data)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
