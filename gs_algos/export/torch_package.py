"""Exports a converted network to one `.pt2` file: compiled ahead of time, it runs with torch, without this library."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gs_algos.core.algorithm import Inputs, evaluating
from gs_algos.core.files import whole_file
from gs_algos.export.example import Example, exportable, new_file, read_by_torch
from gs_kernels.runtime.torch_private import compile_package

WHO = "export_package"
KEY = "golden_stick"  # of the package's own metadata
VERSION = 1
SEVERAL = 2  # version of a package with several inputs or outputs


@dataclass(frozen=True)
class PackageInput:
    """Describes what a package takes, which it does not check: another shape is computed with, or kills the process.

    Args:
        shape: without the batch.
        dtype: its name in torch, e.g. "float32".
        device: "cpu" or "cuda".
        pixels: (mean, standard deviation) by channel of the pixels / 255 of images that become inputs; None: unknown.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def export_package(
    model: nn.Module,
    example: Inputs,
    path: str | os.PathLike[str],
    *,
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Path:
    """Compiles the network with AOTInductor into the new file `path`, for any batch size on the device of `example`.

    `torch._inductor.aoti_load_package(path)` loads it. It takes a C++ compiler, and minutes for a large network.

    Args:
        example: `[B, ...]`, B at least 2; or a tuple of such, or a dict by name. Inputs whose first size is not B, that
            of the first, keep their sizes.
        pixels: as `PackageInput`; what serves the package then takes pictures.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it is prepared for training and not converted, the file is there already or does not end in
            .pt2, the example is none of the above or does not run through the network, or pixels are not a mean and a
            deviation for each channel of one input.
        UnsupportedError: if torch cannot read the network.
    """
    target = new_file(path, ".pt2", WHO)
    network, call = exportable(model, example, WHO)
    metadata = _metadata_of(call, pixels)
    with evaluating(network), torch.no_grad(), read_by_torch(WHO):
        program = torch.export.export(network, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes)
    archive_metadata = {KEY: json.dumps(metadata)}
    with whole_file(target) as draft:
        compile_package(program, str(draft), archive_metadata)
    return target


def read_package(path: str | os.PathLike[str], who: str) -> PackageInput:
    """Reads which input a package takes, without running anything of it.

    Raises:
        ValueError: if the file is no package that `export_package` of this version wrote, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            archive_metadata = json.loads(archive.read(names[0])).get(KEY) if names else None
    except (OSError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{who}: {path} must be a whole .pt2 package, got {error}; export it again") from error
    if damaged is not None:
        raise ValueError(f"{who}: {path} must be a whole .pt2 package, got other bytes in {damaged}; export it again")
    if archive_metadata is None:
        raise ValueError(
            f"{who}: {path} must say what it takes, got a package that gs_algos.export_package or "
            "golden-stick export did not write; export it with one of them"
        )
    return _read(archive_metadata, f"{who}: {path}")


def _metadata_of(call: Example, pixels: tuple[Sequence[float], Sequence[float]] | None) -> dict[str, Any]:
    """Makes what the package says of its inputs and outputs."""
    if call.names != ("x",) or call.outputs != ("y",):
        if pixels is not None:
            got = f"{', '.join(call.names)} to {', '.join(call.outputs)}"
            raise ValueError(f"{WHO}: pixels go with a network of one input and one output, got {got}; leave them out")
        return {"version": SEVERAL, "inputs": call.names, "outputs": call.outputs}
    x = call.tensors[0]
    shape = tuple(x.shape[1:])
    if pixels is not None and [len(part) for part in pixels] != [shape[0]] * 2:
        raise ValueError(f"{WHO}: pixels must be a mean and a deviation for each of {shape[0]} channels, got {pixels}")
    scaling = None if pixels is None else (tuple(pixels[0]), tuple(pixels[1]))
    accepted = PackageInput(shape, str(x.dtype).removeprefix("torch."), x.device.type, scaling)
    return {"version": VERSION, **asdict(accepted)}


def _read(text: Any, where: str) -> PackageInput:
    try:
        metadata = json.loads(text)
        version = metadata.pop("version")
        if version == VERSION:
            pixels: Any = metadata.pop("pixels")
            pixels = None if pixels is None else (tuple(pixels[0]), tuple(pixels[1]))
            return PackageInput(**{**metadata, "shape": tuple(metadata["shape"])}, pixels=pixels)
        several = f"{', '.join(metadata['inputs'])} to {', '.join(metadata['outputs'])}" if version == SEVERAL else None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{where} must say what it takes, got {text!r:.200}; it is damaged") from error
    if several is not None:
        raise ValueError(
            f"{where} must take one tensor and give one, got {several}; call it with torch._inductor.aoti_load_package"
        )
    raise ValueError(f"{where}: version must be {VERSION}, got {version!r}; update golden-stick")
