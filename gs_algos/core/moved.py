"""Modules that have another name now: the old one works for one minor version and says so."""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """Makes `old`, the module whose import calls this, the module `new`, with a DeprecationWarning."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next minor version", DeprecationWarning, stacklevel=2
    )
    sys.modules[old] = importlib.import_module(new)
