"""`golden-stick compress`: runs a recipe from float training to the last stage, and measures everything after each."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import gs_algos
from gs_algos.analysis.report.search import search_of
from gs_algos.cli.analyze import check_page, write_report
from gs_algos.cli.demo import bar, check_fit
from gs_algos.cli.search_data import give_data
from gs_algos.cli.synthetic import NAME, STEPS, synthetic_data
from gs_algos.core.algorithm import Algorithm, inner_of
from gs_algos.core.files import write_atomically
from gs_algos.core.timing import forward_ms
from gs_algos.demo.data import ImageData, batches_per_epoch, load_data, train_batches
from gs_algos.demo.models import build, check_name
from gs_algos.demo.train import TrainConfig, accuracy, predict, train
from gs_algos.demo.training_defaults import float_training, tuning_training
from gs_algos.distill.teacher import teacher_from
from gs_algos.pipeline.pipeline import Pipeline, Stage
from gs_algos.pipeline.recipe import TEACHER, Recipe, StageRecipe, make_algorithm, read_recipe
from gs_algos.pruning.pruner import Pruner
from gs_algos.pruning.scop import SCOP
from gs_algos.qat.slb.algorithm import SLB

RECIPE_FILE = "recipe.json"
IMAGES_FILE = "images.safetensors"  # the generator of synthetic images
SEARCH_FILE = "search.json"  # what a report shows of a search of SLB
JOURNAL = "search-{}.jsonl"  # what the search of a stage has measured
KNOCKOFF_BATCHES = 64  # of training images that a knock-off generator is fitted to
REFITTED, REFITTED_BATCH = 512, 64  # training images that layers are refitted to after a cut


@dataclass(frozen=True)
class Row:
    """Is one network of the run. ms: median milliseconds of a forward, by batch size."""

    name: str
    accuracy: float
    parameters: int
    nbytes: int
    ms: dict[int, float]


def run_compress(
    path: Path,
    out: Path,
    resume: bool,
    device: torch.device,
    console: Console,
    page: Path | None = None,
    data_name: str = "",
) -> list[Row]:
    """Runs the recipe in a file, printing to `console`; `out` gets a checkpoint folder for each stage.

    Args:
        page: where to write what was done as a page.
        data_name: a data set in place of the recipe's; or "synthetic", images made from the float network, which the
            stages are then trained on.

    Raises:
        ValueError: if the recipe is wrong, data is missing, or `out` is not of this recipe.
        Interrupted: after Ctrl-C; `resume` then continues in the same `out`.
    """
    check_page(page, "compress")
    recipe = read_recipe(path)
    if data_name == NAME:
        recipe = replace(recipe, synthetic=recipe.synthetic or STEPS)
    elif data_name:
        recipe = replace(recipe, data=data_name, synthetic=0)
    check_name(recipe.model)
    data = load_data(recipe.data, recipe.image_size).to(device)
    tunes = [_tune(recipe, number, data) for number in range(len(recipe.stage))]

    def fresh() -> nn.Module:
        torch.manual_seed(recipe.seed)
        net = build(recipe.model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
        return net.to(device)

    check_fit(fresh(), recipe.model, data)
    # what a file lacks is told before an earlier run in `out` gives way
    given = None if recipe.weights is None else _filled(fresh(), recipe.model, recipe.weights)
    named = [_named_teacher(stage, data) for stage in recipe.stage]
    _claim(out, recipe, resume)
    net = _float(recipe, fresh(), data, out, resume) if given is None else given
    before = copy.deepcopy(net) if page is not None else net  # the stages change the network itself
    rows = [measure("float", net, data, sum(t.numel() * t.element_size() for t in net.state_dict().values()))]
    if recipe.synthetic:
        state = out / IMAGES_FILE
        data = synthetic_data(net, data, recipe.synthetic, recipe.seed, state, resume)
        tunes = [_tune(recipe, number, data) for number in range(len(recipe.stage))]
    steps = [batches_per_epoch(data, tune.batch_size) for tune in tunes]
    pairs = zip(recipe.stage, named, strict=True)
    teachers = [
        other or (None if stage.distill is None else teacher_from(net, stage.distill.get("train_teacher", False)))
        for stage, other in pairs
    ]
    stages = zip(recipe.stage, steps, teachers, strict=True)
    pipeline = Pipeline([make_algorithm(*stage) for stage in stages], out / "stages")
    for number, algorithm in enumerate(pipeline.algorithms, 1):
        give_data(algorithm, data, out / JOURNAL.format(number))

    def train_stage(net: nn.Module, stage: Stage) -> None:
        assert stage.folder is not None
        tune = tunes[stage.number - 1]
        with bar(f"{stage.name}, {tune.epochs} epochs") as on_step:
            state = stage.folder / "training.safetensors"
            train_compressed(net, data, tune, stage.algorithm, state, stage.resumed, on_step)
        if isinstance(algorithm := inner_of(stage.algorithm), SLB):
            write_atomically(out / SEARCH_FILE, json.dumps(search_of(algorithm)).encode())

    if resume and (out / "stages").is_dir():
        net = pipeline.resume(fresh, data.example(), train_stage)
    else:
        net = pipeline.run(net, data.example(), train_stage)
    for last in pipeline.folders():
        loaded = gs_algos.load(last, fresh)
        rows.append(measure(last.name, loaded, data, folder_bytes(last)))
    exact = torch.equal(predict(loaded, data), predict(net, data))
    console.print(_table(rows))
    console.print(
        f"saved, and {'equal' if exact else 'NOT equal'} when loaded: golden-stick info {last}", soft_wrap=True
    )
    if page is not None:
        search = json.loads((out / SEARCH_FILE).read_text()) if (out / SEARCH_FILE).is_file() else None
        console.print(write_report(before, net, data, page, f"{recipe.model}, {path.name}", search), soft_wrap=True)
    return rows


def train_compressed(
    net: nn.Module,
    data: ImageData,
    recipe: TrainConfig,
    algorithm: Algorithm,
    state: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> float:
    """Runs `train`, and what pruning needs beside it: knock-offs; after the cut refitted layers, fresh batch norms."""
    inner = inner_of(algorithm)

    def images() -> Iterator[Tensor]:
        return (x for x, _ in train_batches(data, recipe.batch_size, recipe.seed, 0))

    def after_cut() -> None:
        assert isinstance(inner, Pruner)
        if inner.config.reconstruct:
            inner.reconstruct(net, data.normalize(data.train_x[:REFITTED]).split(REFITTED_BATCH))
        inner.refresh(net, images())

    def watch(done: int, total: int, loss: Tensor) -> None:
        if isinstance(inner, Pruner) and done == inner.config.select_steps:
            after_cut()
        if on_step is not None:
            on_step(done, total, loss)

    if isinstance(inner, SCOP) and inner.config.knockoffs == "generator":
        inner.fit_knockoffs(list(itertools.islice(images(), KNOCKOFF_BATCHES)))
    continues = resume and state is not None and state.is_file()
    if isinstance(inner, Pruner) and not inner.config.select_steps and not continues:
        after_cut()
    return train(net, data, recipe, algorithm=algorithm, state=state, resume=resume, on_step=watch)


def measure(name: str, net: nn.Module, data: ImageData, nbytes: int) -> Row:
    """Measures accuracy on the whole test set, size and latency of a network."""
    x = data.normalize(data.test_x[:1])
    ms = {batch: forward_ms(net, x.repeat(batch, 1, 1, 1)).p50 for batch in (1, 64)}
    parameters = sum(t.numel() for key, t in net.state_dict().items() if not key.endswith(_STATISTICS))
    return Row(name, accuracy(predict(net, data), data), parameters, nbytes, ms)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _tune(recipe: Recipe, number: int, data: ImageData) -> TrainConfig:
    stage = recipe.stage[number]
    tune = tuning_training(recipe.model, data, stage.epochs, recipe.seed + number, recipe.batch_size)
    return tune if stage.lr is None else replace(tune, lr=stage.lr)


def _float(recipe: Recipe, net: nn.Module, data: ImageData, out: Path, resume: bool) -> nn.Module:
    """Trains the float network."""
    base = float_training(recipe.model, data, recipe.float_epochs, recipe.seed, recipe.batch_size)
    with bar(f"float, {base.epochs} epochs") as on_step:
        train(net, data, base, state=out / "float.state.safetensors", resume=resume, on_step=on_step)
    return net


def _named_teacher(stage: StageRecipe, data: ImageData) -> nn.Module | None:
    """Makes the network that a stage names as its teacher; None if it names none."""
    if stage.distill is None or TEACHER[0] not in stage.distill:
        return None
    name, weights = (stage.distill[key] for key in TEACHER)
    check_name(name)
    teacher = build(name, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
    return _filled(teacher, name, weights).to(data.train_x.device)


def _filled(net: nn.Module, name: str, weights: str) -> nn.Module:
    """Loads the tensors of a file into a float network."""
    try:
        net.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"compress: {weights} must hold a float {name}, got: {reason}") from error
    return net


def _claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Makes `out` this recipe's: refuses a foreign folder, and on resume another recipe's; else starts it anew."""
    path, ours = out / RECIPE_FILE, json.loads(json.dumps(asdict(recipe)))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not path.is_file())):
        raise ValueError(f"compress: --out must be a new, an empty or a recipe's folder, got {out}; choose another")
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        written = (out / name for name in ("float.state.safetensors", IMAGES_FILE, SEARCH_FILE))
        for stale in (*written, *out.glob(JOURNAL.format("*"))):
            stale.unlink(missing_ok=True)
        write_atomically(path, json.dumps(ours, indent=1).encode())
        return
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"compress: --resume needs a folder that an earlier run wrote, got {out}: {error}") from error
    differs = [key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key]]
    if differs:
        raise ValueError(f"compress: --resume needs the recipe of the run in {out}, got another {', '.join(differs)}")


def _table(rows: list[Row]) -> Table:
    table = Table()
    for heading in ("network", "accuracy %", "numbers", "bytes", "ms, 1", "ms, 64"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for row in rows:
        ms = (f"{row.ms[batch]:.2f}" for batch in (1, 64))
        table.add_row(row.name, f"{row.accuracy:.2f}", f"{row.parameters:,}", f"{row.nbytes:,}", *ms)
    return table
