"""`golden-stick search`: finds the rules of an algorithm for a trained network, under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gs_algos.cli.analyze import check_page, fill
from gs_algos.cli.demo import make_algorithm
from gs_algos.cli.search_data import best_so_far, training_inputs
from gs_algos.core.algorithm import Algorithm
from gs_algos.core.registry import algorithm_class
from gs_algos.demo.data import load_data
from gs_algos.demo.models import build, check_name
from gs_algos.pruning.pruner import Pruner
from gs_algos.search.policy import Policy
from gs_algos.search.search import search_rules
from gs_algos.search.stage import Search


@dataclass(frozen=True)
class SearchFiles:
    """Names what a search reads and writes, beside the network's weights.

    Args:
        journal: keeps what was measured.
        latency: times of layers, for a budget of ms.
        out: the page.
    """

    journal: Path | None = None
    latency: Path | None = None
    out: Path | None = None


def run_search(
    model: str,
    weights: Path | None,
    data: str,
    algorithms: Sequence[Algorithm],
    batch: int | None,
    samples: int,
    device: torch.device,
    files: SearchFiles,
    **options: Any,
) -> str:
    """Searches, and returns what was found as text; writes the page.

    Raises:
        ValueError: if the weights do not fit the network, there are fewer images than a batch, or as `search`.
    """
    check_page(files.out, "search")
    check_name(model)
    images = load_data(data).to(device)
    if not 1 <= samples <= len(images.train_x):
        raise ValueError(f"search: --samples must be in 1..{len(images.train_x)} for {images.name}, got {samples}")
    net = build(model, in_channels=images.channels, num_classes=images.classes, image_size=images.image_size)
    if weights is not None:
        fill(net, weights, "search")
    net = net.to(device).eval()
    example = images.example() if batch is None else images.normalize(images.train_x[:batch])
    with best_so_far("search") as on_step:
        policy = search_rules(
            net,
            example,
            algorithms,
            training_inputs(images, samples),
            latency=files.latency,
            journal=files.journal,
            on_step=on_step,
            **options,
        )
    if weights is None:
        policy = policy.noting(f"{model} has random weights; --weights gives it trained ones")
    return _written(policy, model, files.out)


def algorithms_of(names: str, weight: str, act: str) -> list[Algorithm]:
    """Makes the algorithms of the command line, one or several with a comma between.

    Raises:
        ValueError: if a name is unknown or that of a search, or an option is none of any of them.
    """
    found = []
    texts = [name.strip() for name in names.split(",") if name.strip()]
    for name in texts:
        if issubclass(algorithm_class(name), Search):
            raise ValueError(
                f"search: --algorithm must be what compresses the network, got {name}; use simqat or prune"
            )
        takes = len(texts) == 1 or not issubclass(algorithm_class(name), Pruner)
        found.append(make_algorithm(name, weight if takes else "", act if takes else ""))
    return found


def read_choices(text: str) -> tuple[str | float, ...]:
    """Reads choices with a comma between; numbers are prune rates."""
    found: list[str | float] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            found.append(float(part))
        except ValueError:
            found += [part] if part else []
    return tuple(found)


def _written(policy: Policy, title: str, out: Path | None) -> str:
    recipe = "\n".join(f"recipe: {line}" for line in policy.recipe_lines())
    if out is None:
        return f"{policy}\n{recipe}"
    policy.report(title).save(out)
    return f"{policy}\n{recipe}\n\nreport: {out}"
