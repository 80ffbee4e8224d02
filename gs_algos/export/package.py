"""A converted network as one `.pt2` file: compiled ahead of time, it runs where torch is, without this library."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import evaluating


def export_package(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> Path:
    """Compiles the network with AOTInductor into the new file `path`, for any batch size on the device of `example`.

    `torch._inductor.aoti_load_package(path)` loads it. It takes a C++ compiler, and minutes for a large network.

    Args:
        example: `[B, ...]`, B at least 2.

    Raises:
        ValueError: if the file is there already or does not end in .pt2, or the example has a batch below 2.
    """
    target = new_file(path, ".pt2", example, "export_package")
    with evaluating(model), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    partial = target.with_name(f".partial-{target.name}")
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


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
