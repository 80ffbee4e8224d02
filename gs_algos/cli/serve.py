"""Runs `golden-stick serve`: finds the engine that fits a folder or file, and becomes that process."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gs_algos.cli.demo import OPTIONS_FILE
from gs_algos.core.checkpoint import INDEX
from gs_algos.export.torch_package import read_package
from gs_algos.llm.folder import read_folder
from gs_algos.llm.integrity import check_tensors, verify_files
from gs_algos.llm.load import is_gguf
from gs_algos.llm.packed_config import METHOD, read_config
from gs_algos.llm.skeleton import renamed_parts
from gs_algos.ptq.kv import elsewhere

WHO = "serve"


def serve_command(path: Path, options: Sequence[str] = (), verify: bool = True) -> list[str]:
    """Returns the command that serves a language model or a `.pt2` package, with these options of its engine added.

    Args:
        verify: compare the SHA-256 of every file of a packed language model.

    Raises:
        ValueError: if the path is neither, or is damaged.
        RuntimeError: if the engine is not installed.
    """
    if path.is_dir() and not (path / "config.json").is_file():
        path = _package_in(path)
    if path.is_dir():
        kv = _check_language_model(path, verify)
        if kv is not None:
            note = f"{elsewhere(kv, 'vLLM')}; --kv-cache-dtype fp8 makes one of 8 bits on GPUs that have them"
            print(f"note: {note}", file=sys.stderr)
        return [*_vllm(path), *options]
    if path.suffix != ".pt2":
        raise ValueError(_of_another_kind(path))
    read_package(path, WHO)
    if importlib.util.find_spec("litserve") is None:
        raise RuntimeError(f"{WHO}: a package needs litserve, got none; pip install 'golden-stick-triton[serve]'")
    return [sys.executable, "-m", "gs_algos.serving.litserve_app", str(path), *options]


def run_serve(path: Path, options: Sequence[str], verify: bool, dry_run: bool) -> None:
    """Prints the command that serves the path, then becomes that process."""
    command = serve_command(path, options, verify)
    print(shlex.join(command), flush=True)
    if not dry_run:
        os.execvp(command[0], command)


def _package_in(folder: Path) -> Path:
    """Returns the only package in a folder.

    Raises:
        ValueError: if there is none, or several.
    """
    packages = sorted(folder.glob("*.pt2"))
    if len(packages) == 1:
        return packages[0]
    if packages:
        names = ", ".join(package.name for package in packages)
        raise ValueError(f"{WHO}: {folder} must hold one .pt2 package, got {names}; give one of the files")
    raise ValueError(_of_another_kind(folder))


def _check_language_model(path: Path, verify: bool) -> str | None:
    """Raises if the folder is damaged; returns the scheme of its cache, if it was packed with one."""
    folder = read_folder(path, WHO)
    settings = folder.config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == METHOD:
        config = read_config(settings, f"{WHO}: {folder.path / 'config.json'}")
        check_tensors(folder, config, WHO, renamed_parts(folder, config.layers, WHO))
        verify_files(folder.path, config.files if verify else {}, WHO)
        return config.kv
    return None


def _vllm(path: Path) -> list[str]:
    """Returns the command of vLLM's server: its module, since builds under another name have no command that works."""
    named = ["--served-model-name", path.resolve().name, "--host", "127.0.0.1"]
    command = shutil.which("vllm")
    if importlib.util.find_spec("vllm") is not None and (command is None or not _installed("vllm")):
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), *named]
    if command is None:
        raise RuntimeError(
            f"{WHO}: a language model needs vLLM, got none; pip install vllm, into the environment of golden-stick"
        )
    return ["vllm", "serve", str(path), *named]


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _of_another_kind(path: Path) -> str:
    wanted = f"{WHO}: {path} must be the folder of a language model, a .pt2 package or a folder with one, got "
    if not path.exists():
        return f"{wanted}nothing there"
    if path.is_dir() and (path / OPTIONS_FILE).is_file():
        return f"{wanted}a demo; golden-stick export {path} NET.pt2 --to pt2, and serve that"
    if path.is_dir() and (path / INDEX).is_file():
        return f"{wanted}a network of gs_algos.save; load it and call gs_algos.export_package"
    if path.is_file() and path.suffix == ".onnx":
        return f"{wanted}an ONNX file; serve it with ONNX Runtime"
    if path.is_file() and path.suffix == ".gguf" and is_gguf(path):
        return f"{wanted}a GGUF file; golden-stick quantize {path} DIR, and serve that"
    return f"{wanted}neither"
