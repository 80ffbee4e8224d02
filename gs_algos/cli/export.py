"""Runs `golden-stick export` and `golden-stick import`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gs_algos import load
from gs_algos.cli.demo import OPTIONS_FILE
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import build
from gs_algos.llm.folder import read_json
from gs_algos.llm.interchange import EXPORTS, InterchangeResult, export_language_model, import_language_model
from gs_algos.ptq.kv import elsewhere

NETWORKS = ("pt2", "onnx")
TARGETS = (*EXPORTS, *NETWORKS)


def run_export(source: Path, target: Path, to: str) -> str:
    """Exports a model, and returns a line on what was written."""
    if to not in TARGETS:
        raise ValueError(f"export: --to must be one of {', '.join(TARGETS)}, got {to!r}")
    if to not in NETWORKS:
        return _described(export_language_model(source, target, to))
    net, data = demo_network(source)
    if to == "pt2":
        from gs_algos.export.torch_package import export_package

        export_package(net, data.example(), target, pixels=(data.mean, data.std))
    else:
        from gs_algos.export.onnx import export_onnx

        export_onnx(net, data.example(), target)
    return f"{target}: {target.stat().st_size:,} bytes"


def demo_network(folder: Path) -> tuple[nn.Module, ImageData]:
    """Loads the converted network that `golden-stick demo` left in a folder, and its data.

    Raises:
        ValueError: if the folder is not a demo's.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        raise ValueError(
            f"export: {folder} must be a folder that golden-stick demo wrote, got one without {OPTIONS_FILE}; "
            "for another network use gs_algos.export_package or gs_algos.export_onnx"
        )
    options = read_json(path, "export")
    data = load_data(options["data"], options["image_size"])
    sizes = {"in_channels": data.channels, "num_classes": data.classes, "image_size": data.image_size}
    return load(folder / "model", lambda: build(options["model"], **sizes)).eval(), data


def run_import(source: Path, target: Path) -> str:
    """Imports a folder, and returns a line on what was written."""
    return _described(import_language_model(source, target))


def _described(done: InterchangeResult) -> str:
    floats = f", now float: {', '.join(done.floats)}" if done.floats else ""
    line = f"{done.folder}: {done.layers} packed layers, {done.nbytes:,} bytes{floats}"
    return line if done.kv is None else f"{line}\nnote: {elsewhere(done.kv, 'what reads it')}"
