"""Modules that have another name now: the old one works for one minor version and says so."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class _Moved(ModuleType):
    """Stands where a module was. What is asked of it is taken from the module of now, with a DeprecationWarning."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"The old name of {new}.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python's import, not by a user
            raise AttributeError(name)
        words = f"{self.__name__} is now {self._new}; the old name goes with the next minor version"
        warnings.warn(words, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(self._new), name)


def keep_old_names(package: str, moved: Mapping[str, str]) -> None:
    """Makes modules importable under the names that they had in `package`.

    Args:
        moved: the last part of the old name -> the whole name of now.
    """
    for old, new in moved.items():
        module = _Moved(f"{package}.{old}", new)
        sys.modules[module.__name__] = module
        setattr(sys.modules[package], old, module)
