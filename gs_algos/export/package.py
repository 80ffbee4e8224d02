"""A converted network as one `.pt2` file: compiled ahead of time, it runs where torch is, without this library."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import evaluating
from gs_algos.core.files import whole_file
from gs_algos.core.network import network_of

KEY = "golden_stick"  # of the package's own metadata
VERSION = 1


@dataclass(frozen=True)
class PackageInput:
    """What a package takes. It does not check that itself: another shape is computed with, or kills the process.

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
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Path:
    """Compiles the network with AOTInductor into the new file `path`, for any batch size on the device of `example`.

    `torch._inductor.aoti_load_package(path)` loads it. It takes a C++ compiler, and minutes for a large network.

    Args:
        example: `[B, ...]`, B at least 2.
        pixels: as `PackageInput`; what serves the package then takes pictures.

    Raises:
        ValueError: if the file is there already or does not end in .pt2, the example has a batch below 2, or pixels
            are not a mean and a deviation for each channel.
    """
    model = network_of(model, "export_package")
    target = new_file(path, ".pt2", example, "export_package")
    about = _about(example, pixels)
    with evaluating(model), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    said = {KEY: json.dumps({"version": VERSION, **asdict(about)})}
    with whole_file(target) as draft:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(draft), inductor_configs={"aot_inductor.metadata": said}
        )
    return target


def read_package(path: str | os.PathLike[str], who: str) -> PackageInput:
    """What the package takes, without running anything of it.

    Raises:
        ValueError: if the file is no package that `export_package` of this version wrote, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            said = json.loads(archive.read(names[0])).get(KEY) if names else None
    except (OSError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{who}: {path} must be a whole .pt2 package, got {error}; export it again") from error
    if damaged is not None:
        raise ValueError(f"{who}: {path} must be a whole .pt2 package, got other bytes in {damaged}; export it again")
    if said is None:
        raise ValueError(
            f"{who}: {path} must say what it takes, got a package that gs_algos.export.package.export_package or "
            "golden-stick export did not write; export it with one of them"
        )
    return _read(said, f"{who}: {path}")


def _about(example: Tensor, pixels: tuple[Sequence[float], Sequence[float]] | None) -> PackageInput:
    shape = tuple(example.shape[1:])
    if pixels is not None and [len(part) for part in pixels] != [shape[0]] * 2:
        raise ValueError(
            f"export_package: pixels must be a mean and a deviation for each of {shape[0]} channels, got {pixels}"
        )
    known = None if pixels is None else (tuple(pixels[0]), tuple(pixels[1]))
    return PackageInput(shape, str(example.dtype).removeprefix("torch."), example.device.type, known)


def _read(text: Any, where: str) -> PackageInput:
    try:
        about = json.loads(text)
        version = about.pop("version")
        if version == VERSION:
            pixels: Any = about.pop("pixels")
            pixels = None if pixels is None else (tuple(pixels[0]), tuple(pixels[1]))
            return PackageInput(**{**about, "shape": tuple(about["shape"])}, pixels=pixels)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{where} must say what it takes, got {text!r:.200}; it is damaged") from error
    raise ValueError(f"{where}: version must be {VERSION}, got {version!r}; update golden-stick")


def new_file(path: str | os.PathLike[str], suffix: str, example: Tensor, who: str) -> Path:
    """The path, once it is known that an export can be written there and that its batch can vary.

    Raises:
        ValueError: if not.
    """
    target = Path(path)
    if target.suffix != suffix or target.exists():
        got = "a file that is there" if target.exists() else target.name
        raise ValueError(f"{who}: the target must be a new file that ends in {suffix}, got {got}; choose another name")
    if example.dim() < 2 or example.shape[0] < 2:
        raise ValueError(f"{who}: example must have a batch of at least 2, got {list(example.shape)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
