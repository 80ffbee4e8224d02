"""Compares ways to search, all else equal: `python -m bench.search --task bits --data fashion-mnist`.

`bits`: a scheme for each weight of a network, in as many bits as 3 for every weight, which are held as 4.
`rates`: a prune rate for each group of channels, at half of the multiply-adds.
`both`: rates and schemes in 6 % of the bytes, found in one search, or in two of half the evaluations one after the
other: rates for half of the multiply-adds, then schemes for the network that they leave.
Every row starts from one float network, has the same data, number of evaluations, repair and fine-tuning, and is tested
on the whole test set. A row is recorded as soon as it is there, and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gs_algos
from bench import record
from bench.accuracy import first_images
from gs_algos.analysis.operations import count_operations
from gs_algos.cli.compress import train_compressed
from gs_algos.core.memory import nbytes_of
from gs_algos.core.timing import forward_ms
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.train import TrainConfig, accuracy, predict, train
from gs_algos.demo.training_defaults import float_training, tuning_training
from gs_algos.search.search import search_rules

AGENTS = ("ilp", "ddpg", "random", "evolution", "evolution-unseeded")
WAYS = {"bits": ("uniform", *AGENTS), "rates": ("uniform", "l2", *AGENTS), "both": ("one search", "two searches")}
UNIFORM, CHOICES = "int3@channel", ("int2@channel", "int4@channel", "int8@channel")
WIDE = "int8@channel"  # of the first and the last layer
SEEN, BATCH = 256, 64  # training images that policies are scored on
HALF, SMALL = "50% macs", "6% bytes"
PRUNING: dict[str, Any] = {"importance": "l2", "reconstruct": True}
UNTUNED = 2000  # test images of the accuracy before fine-tuning


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=WAYS, default="bits")
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="default: all of the task")
    parser.add_argument("--data", default="fashion-mnist", help="as golden-stick demo --data")
    parser.add_argument("--train-images", type=int, default=12000, metavar="N", help="of the float training")
    parser.add_argument("--tune-images", type=int, default=6000, metavar="N", help="of the fine-tuning, the first ones")
    parser.add_argument("--float-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="of the fine-tuning")
    parser.add_argument("--evaluations", type=int, default=60, help="of whole policies, of each way that searches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of search and fine-tuning")
    parser.add_argument("--state", type=Path, default=Path("build/accuracy"), help="where the float network is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        data = first_images(load_data(args.data), args.train_images)
        ways = args.ways or WAYS[args.task]
        for way in ways:
            if way not in WAYS[args.task]:
                raise ValueError(f"--ways: must be of {', '.join(WAYS[args.task])}, got {way!r}")
        net, floating = float_network(args, data)
    except (ValueError, OSError) as error:
        print(f"bench.search: {error}", file=sys.stderr)
        return 2
    for seed in args.seeds:
        for way in ways:
            row = {
                **{key: getattr(args, key) for key in ("task", "model", "float_epochs", "epochs", "evaluations")},
                **{"data": data.name, "tune_images": args.tune_images, "way": way, "seed": seed},
            }
            if not is_recorded(row):
                row |= {"float": floating, **measure(args, net, data, way, seed)}
                path = record.append(row, kind="search", device="cpu")
                shown = ("way", "seed", "nbytes", "macs", "score", "untuned", "accuracy", "search_cpu_seconds")
                print({key: row[key] for key in shown}, f"recorded in {path}", flush=True)
    return 0


def float_network(args: argparse.Namespace, data: ImageData) -> tuple[nn.Module, float]:
    """Returns the float network, trained here or before, with its accuracy; all seeds start from it."""
    torch.manual_seed(0)
    net = build(args.model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = f"{args.model}-{args.data.partition(':')[0]}-{args.train_images}-s0-float{args.float_epochs}.safetensors"
    train(net, data, float_training(args.model, data, args.float_epochs, 0, 128), state=args.state / name, resume=True)
    return net.eval(), round(accuracy(predict(net, data), data), 2)


def is_recorded(row: dict[str, Any]) -> bool:
    """Says whether there is a row of these settings already."""
    files = sorted(record.RESULTS.glob("*/*.jsonl"))
    rows = [found for path in files if path.parent.name != "static" for found in record.read_rows(path)]
    return any(found["kind"] == "search" and row.items() <= found.items() for found in rows)


def measure(args: argparse.Namespace, net: nn.Module, data: ImageData, way: str, seed: int) -> dict[str, Any]:
    """Finds a policy, fine-tunes the network with it, and tests it."""
    started, cpu = time.perf_counter(), time.process_time()
    stages, found = chosen(args, net, data, way, seed)
    spent = {
        "search_seconds": round(time.perf_counter() - started, 1),
        "search_cpu_seconds": round(time.process_time() - cpu, 1),
    }
    few = replace(data, test_x=data.test_x[:UNTUNED], test_y=data.test_y[:UNTUNED])
    some = first_images(data, args.tune_images)
    tune = tuning_training(args.model, data, args.epochs, seed, 128)
    live = net
    for stage in stages[:-1]:
        live = stage.convert(untrained(stage, live, some, tune), data.example())
    algorithm = stages[-1]
    live = untrained(algorithm, live, some, tune)
    untuned = accuracy(predict(live, few), few)
    started = time.process_time()
    train(live, some, tune, algorithm=algorithm)
    seconds = round(time.process_time() - started, 1)
    live = algorithm.convert(live, data.example())
    x = data.normalize(data.test_x[:1])
    return {
        **found,
        **spent,
        "rules": [list(rule) for stage in stages for rule in stage.config.rules],
        "nbytes": nbytes_of(live),
        "macs": count_operations(live, x, "bench.search").macs,
        "ms": round(forward_ms(live, x).p50, 3),
        "untuned": round(untuned, 2),
        "accuracy": round(accuracy(predict(live, data), data), 2),
        "tuning_cpu_seconds": seconds,
    }


def untrained(algorithm: Any, net: nn.Module, data: ImageData, tune: TrainConfig) -> nn.Module:
    """Returns a copy of the network as the algorithm has it before any step: what pruning does then is done."""
    live: nn.Module = algorithm.apply(copy.deepcopy(net), data.example())
    train_compressed(live, data, replace(tune, epochs=0), algorithm)
    return live


def chosen(
    args: argparse.Namespace, net: nn.Module, data: ImageData, way: str, seed: int
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the algorithms, one after the other, with their rules, and what the search says of them."""
    generator = torch.Generator().manual_seed(seed)
    some = data.normalize(data.train_x[torch.randperm(len(data.train_x), generator=generator)[:SEEN]]).split(BATCH)
    options: dict[str, Any] = {"evaluations": args.evaluations, "seed": seed}
    if args.task == "both":
        quantizing = quantizer(net)
        if way == "one search":
            options |= {"choices": CHOICES, "budget": SMALL}
            policy = search_rules(net, data.example(), [gs_algos.Prune(**PRUNING), quantizing], some, **options)
            return list(policy.algorithms()), {"score": policy.score, "evaluated": policy.evaluated}
        options["evaluations"] //= 2
        rates = search_rules(net, data.example(), gs_algos.Prune(**PRUNING), some, budget=HALF, **options)
        (prune,) = rates.algorithms()
        tune = tuning_training(args.model, data, args.epochs, seed, 128)
        cut = prune.convert(untrained(prune, net, data, tune), data.example())
        left = f"{nbytes_of(net) * 0.06 / 1e3:.3f} kB"
        bits = search_rules(cut, data.example(), quantizing, some, budget=left, choices=CHOICES, **options)
        evaluated = rates.evaluated + bits.evaluated
        return [rates.algorithms()[0], *bits.algorithms()], {"score": bits.score, "evaluated": evaluated}
    uniform: Any
    base: Any
    if args.task == "bits":
        base, budget, options["choices"] = quantizer(net), uniform_budget(net), CHOICES
        uniform = gs_algos.SimQAT(weight=UNIFORM, act=None, rules=base.config.rules)
    else:
        uniform = gs_algos.Prune(budget="50% flops", **PRUNING)
        base, budget = gs_algos.Prune(**PRUNING), HALF
    if way == "uniform":
        return [uniform], {"score": None}
    if way == "l2":
        return [gs_algos.Prune(budget="50% flops", scope="global", **PRUNING)], {"score": None}
    policy = search_rules(net, data.example(), base, some, budget=budget, agent=way, **options)
    return [policy.algorithms()[0]], {"score": policy.score, "evaluated": policy.evaluated, "budget": budget}


def quantizer(net: nn.Module) -> gs_algos.SimQAT:
    """Makes the algorithm whose weights are searched, the first and the last layer of 8 bits."""
    ends = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return gs_algos.SimQAT(act=None, rules=[(name, {"weight": WIDE}) for name in (ends[0], ends[-1])])


def uniform_budget(net: nn.Module) -> str:
    """Returns what 3 bits and a scale of 32 for each channel take, of a weight, in the layers that have a choice."""
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)][1:]
    channels, numbers = (sum(n) for n in zip(*((c.out_channels, c.weight.numel()) for c in convs), strict=True))
    return f"{3 + 32 * channels / numbers:.4f} bits"


if __name__ == "__main__":
    raise SystemExit(main())
