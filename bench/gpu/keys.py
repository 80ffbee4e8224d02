"""Makes Triton's keys of our kernels depend on no order in which a process meets them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import gs_kernels


def settle_keys() -> None:
    """Computes the keys of all kernels and their helpers, again and again until none changes.

    Triton 3.6 adds the constants that a helper reads to the key of a kernel only if the helper's own key is known by
    then: a kernel has one key in a process that ran a neighbour with the same helper first, another in one that did
    not, and each misses in a cache that the other filled.
    """
    from triton.runtime.jit import JITFunction

    for module in pkgutil.walk_packages(gs_kernels.__path__, "gs_kernels."):
        if "kernel" in module.name.split("."):  # not the libraries of CPU kernels, which are no modules
            importlib.import_module(module.name)
    ours = [module for name, module in sys.modules.items() if name.startswith("gs_kernels")]
    functions: list[Any] = [f for module in ours for f in vars(module).values() if isinstance(f, JITFunction)]
    before: list[str] = []
    while (keys := [f.cache_key for f in functions]) != before:
        before = keys
        for f in functions:
            f.hash = None
