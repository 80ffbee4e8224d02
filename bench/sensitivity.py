"""Measures how well each score predicts what random bits cost: `python -m bench.sensitivity --model resnet20`.

A float network is trained, 40 random policies round each of its weights to a width of its own, and the loss on the test
set is compared with the sum of the layers' scores from training images: Spearman's rank correlation, for widths of 2 to
8 bits and of 3 to 6. A row for each score, with the seconds that it took.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import record
from bench.accuracy import first_images
from gs_algos.analysis.probe import Policy, Probe
from gs_algos.analysis.sensitivity import SCORES, sensitivity
from gs_algos.core.algorithm import evaluating
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.train import accuracy, predict, train
from gs_algos.demo.training_defaults import float_training

WIDTHS = {"2-8": (2, 3, 4, 6, 8), "3-6": (3, 4, 6)}
SEEN, BATCH = 256, 64  # training images that scores are from


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sensitivity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--data", default="digits", help="as golden-stick demo --data")
    parser.add_argument("--train-images", type=int, metavar="N", help="train on the first N only")
    parser.add_argument("--test-images", type=int, default=2000, help="that losses are measured on, at most")
    parser.add_argument("--epochs", type=int, default=10, help="of the float training")
    parser.add_argument("--policies", type=int, default=40, help="random ones, for each range of widths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        data = first_images(load_data(args.data), args.train_images)
    except (ValueError, OSError) as error:
        print(f"bench.sensitivity: {error}", file=sys.stderr)
        return 2
    data = replace(data, test_x=data.test_x[: args.test_images], test_y=data.test_y[: args.test_images])
    net = trained(args.model, data, args.epochs, args.seed)
    sites = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    schemes = {bits: f"int{bits}@channel" for bits in sorted({b for own in WIDTHS.values() for b in own})}
    seen = list(data.normalize(data.train_x[:SEEN]).split(BATCH))
    found = {}
    for by in SCORES:
        started = time.perf_counter()
        scores = sensitivity(net, seen, dict.fromkeys(sites, tuple(schemes.values())), by=by, seed=args.seed).scores
        found[by] = {site: list(own.values()) for site, own in scores.items()}, time.perf_counter() - started
    probe, places = Probe(net, "bench.sensitivity"), list(schemes)
    for widths, own in WIDTHS.items():
        policies = random_policies(sites, own, args.policies, args.seed)
        losses = [loss_of(probe, {s: schemes[b] for s, b in policy.items()}, data) for policy in policies]
        for by, (scores_of, seconds) in found.items():
            sums = [sum(scores_of[s][places.index(b)] for s, b in policy.items()) for policy in policies]
            row = {
                "model": args.model,
                "data": data.name,
                "epochs": args.epochs,
                "test": len(data.test_x),
                "accuracy": round(accuracy(predict(net, data), data), 2),
                "score": by,
                "widths": widths,
                "policies": len(policies),
                "correlation": round(rank_correlation(sums, losses), 3),
                "seconds": round(seconds, 2),
                "samples": SEEN,
            }
            record.append(row, kind="sensitivity", device="cpu")
            print({key: row[key] for key in ("model", "widths", "score", "correlation", "seconds")}, flush=True)
    return 0


def trained(model: str, data: ImageData, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = build(model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
    train(net, data, float_training(model, data, epochs, seed, None))
    return net.eval()


def random_policies(sites: list[str], widths: tuple[int, ...], count: int, seed: int) -> list[dict[str, int]]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(widths), (count, len(sites)), generator=generator).tolist()
    return [{site: widths[pick] for site, pick in zip(sites, row, strict=True)} for row in picks]


def loss_of(probe: Probe, policy: dict[str, str], data: ImageData) -> float:
    with evaluating(probe.network), probe.set(Policy(policy)):
        return float(F.cross_entropy(predict(probe.network, data), data.test_y))


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Returns Spearman's rank correlation."""
    x, y = (ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Returns ranks, those of equal values their mean."""
    order = (values[:, None] > values[None]).sum(1).double()
    equal = (values[:, None] == values[None]).sum(1).double()
    return order + (equal - 1) / 2


if __name__ == "__main__":
    raise SystemExit(main())
