"""`golden-stick demo`: goes from random weights to a reloaded compressed network, and measures on the way."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import gs_algos
from gs_algos.analysis.report.search import search_of
from gs_algos.cli.analyze import check_page, write_report
from gs_algos.cli.search_data import give_data
from gs_algos.core.algorithm import Algorithm, evaluating, run
from gs_algos.core.arguments import as_seed
from gs_algos.core.files import write_atomically
from gs_algos.core.registry import algorithm_class
from gs_algos.core.timing import forward_ms
from gs_algos.demo.data import ImageData, batches_per_epoch, load_data
from gs_algos.demo.models import build, check_name
from gs_algos.demo.train import TrainConfig, accuracy, predict, train
from gs_algos.demo.training_defaults import float_training, tuning_training
from gs_algos.qat.slb.algorithm import SLB

OPTIONS_FILE = "demo.json"
JOURNAL = "search.jsonl"  # what a search has measured
SMALL = 10_000  # training images below which epochs are cheap


@dataclass(frozen=True)
class DemoOptions:
    """Holds the options that decide the result: two demos with equal options give equal networks."""

    data: str = "digits"
    model: str = "resnet20"
    algorithm: str = "simqat"
    weight: str = ""
    act: str = ""
    float_epochs: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    image_size: int = 64
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Stage:
    """Is one row of the table. error: relative RMS of the test logits against the stage before it should equal."""

    name: str
    accuracy: float
    nbytes: int | None
    ms: dict[int, float]
    error: float | None
    differing: int


def make_algorithm(name: str, weight: str, act: str, **more: Any) -> Algorithm:
    """Makes the algorithm from the options of the command line: "" is its default, "none" leaves inputs float.

    Raises:
        ValueError: on an unknown name, or an option that the algorithm lacks or cannot read.
    """
    given = {"weight": weight, "act": act}
    options = {key: None if text == "none" else text for key, text in given.items() if text}
    cls: Any = algorithm_class(name)
    for key in options.keys() - inspect.signature(cls).parameters.keys():
        raise ValueError(f"{name}: --{key} is no option of {cls.__name__}, which quantizes nothing; leave it out")
    return algorithm_class(name)(**options, **more)  # type: ignore[call-arg]


def run_demo(options: DemoOptions, out: Path, resume: bool, console: Console, page: Path | None = None) -> list[Stage]:
    """Runs every stage, printing to `console`, and leaves float.safetensors and the checkpoint folder `model` in `out`.

    page: where to write what was done as a page.

    Raises:
        ValueError: on unknown names, missing data, or an `out` that is not this demo's.
        Interrupted: after Ctrl-C; `resume` then continues in the same `out`.
    """
    as_seed(options.seed, "demo: --seed")
    check_page(page, "demo")
    if options.image_size < 1:
        raise ValueError(f"demo: --image-size must be at least 1, got {options.image_size}")
    chosen = make_algorithm(options.algorithm, options.weight, options.act)  # a wrong name, before anything is read
    if options.epochs and not chosen.trains:
        raise ValueError(
            f"demo: --epochs must be 0 for {options.algorithm}, which is calibrated and not trained, got "
            f"{options.epochs}; leave it out"
        )
    check_name(options.model)
    device = pick_device(options.device, "demo")
    data = load_data(options.data, options.image_size).to(device)
    base, tune = _recipes(options, data)
    length = algorithm_class(options.algorithm).training_options(tune.epochs, batches_per_epoch(data, tune.batch_size))
    algo = make_algorithm(options.algorithm, options.weight, options.act, **length)

    def fresh() -> nn.Module:
        torch.manual_seed(options.seed)
        net = build(options.model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
        return net.to(device)

    net = fresh()
    check_fit(net, options.model, data)
    if tune.epochs == 0 and getattr(algo.config, "select_steps", False):
        raise ValueError(f"demo: --epochs must be >= 1 for {options.algorithm}, which has to learn what to cut, got 0")
    with console.status("planning"):
        algo.plan(net, data.example())  # what cannot be planned is not worth a float training
    claim_folder(out, options, resume)
    console.print(
        f"{options.model} on {data.name}: {len(data.train_x):,} training and {len(data.test_x):,} test images of "
        f"{data.channels}x{data.image_size}x{data.image_size}, {data.classes} classes, on {options.device}",
        soft_wrap=True,
    )
    with bar(f"float, {base.epochs} epochs") as on_step:
        train(net, data, base, state=out / "float.state.safetensors", resume=resume, on_step=on_step)
    write_atomically(
        out / "float.safetensors", to_bytes({k: v.cpu().contiguous() for k, v in net.state_dict().items()})
    )
    float_logits = predict(net, data)
    stages = [_stage("float", net, data, float_logits, None, (out / "float.safetensors").stat().st_size)]

    give_data(algo, data, out / JOURNAL)
    with console.status("preparing"):
        plan = algo.plan(net, data.example())
        net = algo.apply(net, data.example())
    algo = algo.active()
    read = f", graph read by {plan.tracer}" if plan.tracer else ""
    console.print(f"{options.algorithm}: {len(plan.acted())} of {len(plan.rows)} sites{read}")
    if algo.trains:
        with bar(f"{options.algorithm}, {tune.epochs} epochs") as on_step:
            state = out / f"{options.algorithm}.state.safetensors"
            train(net, data, tune, algorithm=algo, state=state, resume=resume, on_step=on_step)
    else:
        train(net, data, tune, algorithm=algo)  # calibrates, with bars of its own
    trained = predict(net, data)
    stages.append(_stage("trained" if algo.trains else "calibrated", net, data, trained, None, None))

    search = search_of(algo) if isinstance(algo, SLB) else {}
    with console.status("converting"):
        net = algo.convert(net, data.example())
        converted = predict(net, data)
        stages.append(_stage("converted", net, data, converted, trained, None))
        gs_algos.save(net, out / "model")
        reloaded = gs_algos.load(out / "model", fresh)
        nbytes = sum(path.stat().st_size for path in (out / "model").iterdir())
        stages.append(_stage("reloaded", reloaded, data, predict(reloaded, data), converted, nbytes))
    console.print(_table(stages))
    console.print(f"saved: golden-stick info {out / 'model'}", soft_wrap=True)
    if page is not None:
        before = fresh()
        before.load_state_dict(load_file(out / "float.safetensors"))
        title = f"{options.model}, {options.algorithm}"
        with console.status("writing the report"):
            line = write_report(before, net, data, page, title, search)
        console.print(line, soft_wrap=True)
    return stages


def check_fit(net: nn.Module, model: str, data: ImageData) -> None:
    """Raises ValueError if the network does not take the images, or does not tell as many classes."""
    with evaluating(net):
        y = run(net, data.example(), model)
    wanted = [2, data.classes]
    if not isinstance(y, Tensor) or list(y.shape) != wanted:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{model}: the network must give logits {wanted} of two images of {data.name}, which has {data.classes} "
            f"classes, got {got}; a function with a parameter num_classes is given their number"
        )


def pick_device(name: str, who: str) -> torch.device:
    """Returns the device of that name.

    Raises:
        ValueError: if this machine has none.
    """
    kinds = ("cpu", "cuda")
    if name.partition(":")[0] not in kinds or (name != "cpu" and not torch.cuda.is_available()):
        usable = " or ".join(kinds if torch.cuda.is_available() else kinds[:1])
        raise ValueError(f"{who}: --device must be {usable} on this machine, got {name!r}")
    return torch.device(name)


def _recipes(options: DemoOptions, data: ImageData) -> tuple[TrainConfig, TrainConfig]:
    small = len(data.train_x) < SMALL
    float_epochs = options.float_epochs if options.float_epochs is not None else (30 if small else 5)
    epochs = options.epochs if options.epochs is not None else (10 if small else 2)
    base = float_training(options.model, data, float_epochs, options.seed, options.batch_size)
    return base, tuning_training(options.model, data, epochs, options.seed, options.batch_size)


def claim_folder(out: Path, options: DemoOptions, resume: bool) -> None:
    """Makes `out` this demo's: refuses a foreign folder, and on resume a demo of other options; else starts it anew.

    Raises:
        ValueError: in these cases, and if there is nothing to resume.
    """
    path, ours = out / OPTIONS_FILE, asdict(options)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not path.is_file())):
        raise ValueError(f"demo: --out must be a new, an empty or a demo's folder, got {out}; choose another")
    if resume:
        if not path.is_file():
            raise ValueError(f"demo: --resume needs a folder that an earlier demo wrote, got {out}; leave --resume out")
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"demo: {path} must be JSON, got {error}; leave --resume out to start anew") from error
        differs = [f"{key} {theirs.get(key)!r}, got {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
        if differs:
            raise ValueError(f"demo: --resume needs the options of the run in {out}: {'; '.join(differs)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.state.safetensors"), *out.glob(JOURNAL)):
        stale.unlink()
    write_atomically(path, json.dumps(ours, indent=1).encode())


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int, Tensor], None]]:
    """Shows a progress bar on stderr, fed by `train`'s `on_step`; the loss is read back every 20 steps only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task(what, loss="")

        def on_step(done: int, total: int, loss: Tensor) -> None:
            text = {"loss": f"loss {loss.item():.3f}"} if done % 20 == 0 else {}
            progress.update(task, completed=done, total=total, **text)  # type: ignore[arg-type]

        yield on_step


def _stage(
    name: str, net: nn.Module, data: ImageData, logits: Tensor, before: Tensor | None, nbytes: int | None
) -> Stage:
    ms = {batch: forward_ms(net, data.normalize(data.test_x[:1]).repeat(batch, 1, 1, 1)).p50 for batch in (1, 64)}
    error, differing = None, 0
    if before is not None:
        error = ((logits - before).square().mean() / before.square().mean().clamp(min=1e-12)).sqrt().item()
        differing = int((logits.argmax(1) != before.argmax(1)).sum())
    return Stage(name, accuracy(logits, data), nbytes, ms, error, differing)


def _table(stages: list[Stage]) -> Table:
    table = Table(
        caption="parity: relative RMS of the test logits against the row above; flips: predictions that differ"
    )
    for heading in ("network", "accuracy %", "bytes", "ms, 1", "ms, 64", "parity", "flips"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for stage in stages:
        error = "" if stage.error is None else "exact" if stage.error == 0 else f"{stage.error:.1e}"
        differing = "" if stage.error is None else str(stage.differing)
        size = "" if stage.nbytes is None else f"{stage.nbytes:,}"
        ms = (f"{stage.ms[batch]:.2f}" for batch in (1, 64))
        table.add_row(stage.name, f"{stage.accuracy:.2f}", size, *ms, error, differing)
    return table
