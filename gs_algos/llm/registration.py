"""Registers the packed format with Transformers as soon as both packages are imported, in either order.

`import gs_algos` calls `install`, which never imports Transformers by itself. Without it Transformers warns of an
unknown `quant_method` and fills the layers with random weights, and `save_pretrained` leaves out how layers are packed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from gs_algos.core.algorithm import listeners

AUTO = "transformers.quantizers.auto"  # where Transformers keeps what is registered
MODELS = "transformers.modeling_utils"
OURS = "gs_algos.llm.transformers_quantizer"
logger = logging.getLogger(__name__)


def install() -> None:
    """Registers the packed format now if Transformers has loaded its quantizers, else once it loads them."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _describe not in listeners:
        listeners.append(_describe)


class _Finder(MetaPathFinder):
    """Finds the module `AUTO` by the other finders, and has `_register` run once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads a module by another loader, then calls `_register`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.__dict__["loader"], name)


def _register() -> None:
    try:
        importlib.import_module(OURS)
    except ImportError as error:
        logger.warning("this Transformers cannot load packed folders, it needs another version: %s", error)


def _describe(model: nn.Module, entry: dict[str, Any]) -> None:
    """Gives a Transformers model the description of its packed layers that `save_pretrained` writes."""
    if MODELS in sys.modules and entry["stage"] == "converted":
        importlib.import_module(OURS).describe(model, entry)
