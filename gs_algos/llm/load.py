"""Loads language models from a packed folder, a plain Transformers folder, or a GGUF file."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gs_algos.core.arguments import as_device, as_path
from gs_algos.llm.folder import read_folder, read_json
from gs_algos.llm.integrity import part_names, trusting
from gs_algos.llm.libraries import WHO, library, quiet
from gs_algos.llm.packed_config import PackedConfig, read_config
from gs_algos.llm.skeleton import fit, naming, skeleton

TOKENIZER = "tokenizer.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_language_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
) -> tuple[Any, Any]:
    """Loads (model in eval mode, tokenizer) from a folder or GGUF file; the layers of a packed folder stay packed.

    Args:
        device: where the model goes.
        dtype: of the arithmetic and of what is not packed; default: what config.json says, fp32 for GGUF.
        verify: compare the SHA-256 of every packed file first; False saves one pass over them.

    Raises:
        ValueError: if nothing is there, another library packed it, a newer version did, a file is damaged, or a
            settings file names code to run; if the device is not here, or a model does not compute in the dtype.
        TypeError: if the path, the device or the dtype is none.
        RuntimeError: if transformers (for GGUF files also gguf and accelerate) is not installed.
    """
    source = as_path(path, f"{WHO}: path")
    as_device(device, WHO)
    refuse_dtype(dtype, WHO)
    if is_gguf(source):
        return load_gguf(source, device, dtype)
    transformers = library("transformers")
    folder = read_folder(source, WHO)
    packed = folder.config.get("quantization_config")
    config: PackedConfig | None = None
    if packed is not None:
        config = read_config(packed, f"{WHO}: {folder.path / 'config.json'}")
        importlib.import_module("gs_algos.llm.transformers_quantizer")
    quiet(transformers)
    parts = set() if config is None else part_names(config)
    plain = {name: facts for name, facts in folder.headers(WHO).items() if name not in parts}
    empty = skeleton(source, WHO)
    for name, want, got in fit(empty, plain).wrong:
        raise ValueError(f"{WHO}: {name} in {source} must be {want} as config.json says, got {got}; one is damaged")
    del empty
    whole = {"local_files_only": True, "trust_remote_code": False}
    with trusting(not verify), naming(WHO, f"{source}, its config.json and its tensors,"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True, **whole
        )
    lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if lost:
        raise ValueError(
            f"{WHO}: {source} must hold every tensor of a {type(model).__name__} and no other, "
            f"got {len(lost)} that differ: {', '.join(lost[:4])}"
        )
    _check_tokenizer(source)
    with naming(WHO, f"the tokenizer of {source}, its {TOKENIZER} and tokenizer_config.json,"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **whole)
    return model.eval().to(device), tokenizer


def refuse_dtype(dtype: torch.dtype | None, who: str) -> None:
    """Raises unless the dtype is one that a model computes in, or None.

    Raises:
        TypeError: if it is no dtype.
        ValueError: if it is another one.
    """
    names = ", ".join(f"torch.{name}" for name in DTYPES)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{who}: dtype must be None or one of {names}, got {dtype!r:.60}")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"{who}: dtype must be None or one of {names}, got {dtype}")


def _check_tokenizer(folder: Path) -> None:
    """Raises if tokenizer.json is there and has not what every one has: tokens beside a model."""
    path = folder / TOKENIZER
    if path.is_file():
        data = read_json(path, WHO)
        for key, kind in (("added_tokens", list), ("model", dict)):
            if not isinstance(data.get(key), kind):
                raise ValueError(
                    f"{WHO}: {path} must have {key}, {'an array' if kind is list else 'an object'}, "
                    f"got {data.get(key)!r:.40}; it is damaged"
                )


def is_gguf(path: Path) -> bool:
    """Says whether the path is a file that starts as GGUF files do.

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
    """Loads (model in eval mode, tokenizer) from a GGUF file and dequantizes it: the whole float model is in memory."""
    transformers = library("transformers", "gguf", "accelerate")
    quiet(transformers)
    config = transformers.GgufConfig(dequantize=True)
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with naming(WHO, f"{path} must be a GGUF file that transformers reads: it"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype or torch.float32, quantization_config=config, **where
        )
    return model.eval().to(device), tokenizer


@dataclass(frozen=True)
class GgufHeader:
    """Holds what the header of a GGUF file says. nbytes: of its tensors; kinds: their types that are not floats."""

    nbytes: int
    kinds: tuple[str, ...]


def gguf_skeleton(path: Path) -> tuple[Any, GgufHeader]:
    """Builds the model of a GGUF file on the meta device, and reads the file's header; no tensor is read.

    Raises:
        ValueError: if it is damaged.
    """
    transformers = library("transformers", "gguf", "accelerate")
    quiet(transformers)
    with naming(WHO, f"{path} must be a GGUF file that transformers reads: it"):
        reader = importlib.import_module("gguf").GGUFReader(path)
        kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors} - {"F64", "F32", "F16", "BF16"})
        header = GgufHeader(sum(int(tensor.n_bytes) for tensor in reader.tensors), tuple(kinds))
        counts = {name: field.contents() for name, field in reader.fields.items() if name.endswith(".block_count")}
        if any(not isinstance(count, int) or count > len(reader.tensors) for count in counts.values()):
            raise ValueError(f"{counts} blocks of {len(reader.tensors)} tensors")
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False), header
