"""Language models from disk: a packed folder, a plain Transformers folder, or a GGUF file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gs_algos.export.folder import read_folder
from gs_algos.export.packed_config import read_config
from gs_algos.export.verify import check_tensors, trusting

WHO = "load_language_model"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_language_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or GGUF file, a packed folder with its packed layers.

    Args:
        device: where the model goes.
        dtype: of the arithmetic and of what is not packed; default: what config.json says, fp32 for GGUF.
        verify: compare the SHA-256 of every packed file first; False saves one pass over them.

    Raises:
        ValueError: if nothing is there, another library packed it, a newer version did, or a file is damaged.
        RuntimeError: if transformers (for GGUF files also gguf and accelerate) is not installed.
    """
    source = Path(path)
    if is_gguf(source):
        return load_gguf(source, device, dtype)
    transformers = library("transformers")
    folder = read_folder(source, WHO)
    packed = folder.config.get("quantization_config")
    if packed is not None:
        check_tensors(folder, read_config(packed, f"{WHO}: {folder.path / 'config.json'}"), WHO)
        importlib.import_module("gs_algos.export.transformers_quantizer")
    quiet(transformers)
    with trusting(not verify):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if lost:
        raise ValueError(
            f"{WHO}: {source} must hold every tensor of a {type(model).__name__} and no other, "
            f"got {len(lost)} that differ: {', '.join(lost[:4])}"
        )
    return model.eval().to(device), transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)


def is_gguf(path: Path) -> bool:
    """Whether the path is a file that starts as GGUF files do.

    Raises:
        ValueError: if it is a file of another kind.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{WHO}: {path} must be a Transformers folder or a GGUF file, got a file that starts {magic!r}"
        )
    return True


def load_gguf(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a GGUF file, its weights dequantized: the whole float model is in memory."""
    transformers = library("transformers", "gguf", "accelerate")
    quiet(transformers)
    config = transformers.GgufConfig(dequantize=True)
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype or torch.float32, quantization_config=config, **where
        )
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{WHO}: {path} must be a GGUF file that transformers reads, got: {error}") from error
    return model.eval().to(device), tokenizer


def library(name: str, *others: str) -> Any:
    """The module `name`, once it and the others are known to be installed."""
    lacking = [package for package in (name, *others) if importlib.util.find_spec(package) is None]
    if lacking:
        raise RuntimeError(
            f"{WHO}: needs the packages {', '.join((name, *others))}, got no {', '.join(lacking)}; "
            "pip install 'golden-stick-triton[hf]'"
        )
    return importlib.import_module(name)


def quiet(transformers: Any) -> None:
    """Progress bars are for terminals."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
