"""Runs `golden-stick analyze` and `golden-stick report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gs_algos.analysis.analyze import analyze, report
from gs_algos.core.checkpoint import INDEX, load
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import MODELS, build
from gs_algos.llm.calibration_text import calibration_text
from gs_algos.llm.load import is_gguf, load_language_model

BATCH = 64  # images
CONTEXT = 512  # tokens of a window


@dataclass(frozen=True)
class Source:
    """Says what a network is measured on.

    Args:
        data: the name of a data set of images; "" for that of the demo.
        text: a text for a language model; None for the built-in one.
        context: tokens of its windows; None for 512.
    """

    data: str = ""
    text: Path | None = None
    context: int | None = None


def run_analyze(
    model: str,
    weights: Path | None,
    source: Source,
    choices: Sequence[str],
    by: str,
    tolerance: float,
    out: Path | None,
) -> str:
    """Analyzes a float network; returns the text, and writes the page."""
    check_page(out, "analyze")
    batches: list[Any]
    if is_language_model(Path(model)):
        if weights is not None:
            raise ValueError(
                f"analyze: --weights goes with a network that is built, got the model {model}; leave it out"
            )
        net, tokenizer = load_language_model(Path(model), dtype=torch.float32)
        batches = windows(tokenizer, net, source, "analyze")
    else:
        images = load_data(source.data or "digits")
        net = _built(model, images)
        if weights is not None:
            fill(net, weights, "analyze")
        batches = test_batches(images)
    page = analyze(net, inputs_in(batches[0]), batches, choices=choices, by=by, tolerance=tolerance)
    if weights is None and model in MODELS:
        page = replace(page, notes=(*page.notes, f"{model} has random weights; --weights gives it trained ones"))
    return _written(page, out)


def run_report(before: Path, after: Path, model: str, source: Source, tolerance: float, out: Path | None) -> str:
    """Compares a float network and a compressed one; returns the text, and writes the page."""
    check_page(out, "report")
    batches: list[Any]
    with Console(stderr=True).status(f"loading {after}"):
        if is_language_model(after):
            first, tokenizer = load_language_model(before, dtype=torch.float32)
            second, _ = load_language_model(after, dtype=torch.float32)
            batches = windows(tokenizer, first, source, "report")
        else:
            if not model:
                raise ValueError(f"report: --model must say what {before} and {after} are built by, got none")
            images = load_data(source.data or "digits")
            first = _built(model, images)
            fill(first, before, "report")
            if not (after / INDEX).is_file():
                raise ValueError(f"report: CONVERTED must be a folder of gs_algos.save, got {after}")
            second = load(after, lambda: _built(model, images))
            batches = test_batches(images)
    return _written(report(first, second, batches, tolerance=tolerance, title=str(after)), out)


def check_page(out: Path | None, who: str) -> None:
    """Raises ValueError if a page cannot be written there, before anything is computed."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        must = "a file" if out.is_dir() else "a file in a folder that is there"
        raise ValueError(
            f"{who}: the page must be {must}, got {out}; try {out / 'report.html' if out.is_dir() else out.name}"
        )


def is_language_model(path: Path) -> bool:
    """Says whether a path is a folder of Transformers or a GGUF file."""
    return (path / "config.json").is_file() or (path.is_file() and is_gguf(path))


def write_report(
    before: nn.Module,
    after: nn.Module,
    data: ImageData,
    out: Path,
    title: str,
    search: Mapping[str, Any] | None = None,
) -> str:
    """Writes the page of a run with images; returns a line that says where it is."""
    report(before, after, test_batches(data), out, title=title, search=search)
    return f"report: {out}"


def test_batches(data: ImageData) -> list[tuple[Tensor, Tensor]]:
    """Returns the test set in batches of images and labels."""
    pairs = zip(data.test_x.split(BATCH), data.test_y.split(BATCH), strict=True)
    return [(data.normalize(x), y) for x, y in pairs]


def windows(tokenizer: Any, model: Any, source: Source, who: str) -> list[dict[str, Tensor]]:
    """Returns a text in windows of tokens."""
    most = getattr(model.config, "max_position_embeddings", CONTEXT)
    context = source.context or min(CONTEXT, most)
    text = calibration_text(source.text, tokenizer, 16, context, context, who)
    return [{"input_ids": window} for window in text.windows]


def inputs_in(batch: Any) -> Any:
    """Returns the inputs of a batch of images and labels, or of tokens."""
    return batch[0] if isinstance(batch, tuple) else batch


def _built(model: str, images: ImageData) -> nn.Module:
    return build(model, in_channels=images.channels, num_classes=images.classes, image_size=images.image_size).eval()


def fill(net: nn.Module, path: Path, who: str) -> None:
    """Loads the tensors of a safetensors file into a network."""
    if path.is_dir():
        raise ValueError(f"{who}: {path} must be a safetensors file of the float network, got a folder")
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{who}: {path} must be a safetensors file of the float network, got: {reason}") from error


def _written(page: Any, out: Path | None) -> str:
    if out is None:
        return str(page)
    page.save(out)
    return f"{page}\n\nreport: {out}"
