"""Imports the libraries that language models need and the rest of the package does not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

WHO = "load_language_model"


def library(name: str, *others: str) -> Any:
    """Imports the module `name` after checking that it and the others are installed."""
    lacking = [package for package in (name, *others) if importlib.util.find_spec(package) is None]
    if lacking:
        raise RuntimeError(
            f"{WHO}: needs the packages {', '.join((name, *others))}, got no {', '.join(lacking)}; "
            "pip install 'golden-stick-triton[hf]'"
        )
    return importlib.import_module(name)


def quiet(transformers: Any) -> None:
    """Turns off Transformers' progress bars unless stderr is a terminal."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
