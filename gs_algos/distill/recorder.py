"""Records what a network was given in its last forward and what some of its layers returned, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gs_algos.core.modules import get_module, remove_hooks

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of a forward


class Recorder:
    """Keeps the inputs of a model's last forward, and the outputs of the layers at `sites`.

    Only what runs inside of a forward of the model counts: gradient checkpointing runs layers again in the backward.
    A copy, or one that was pickled, has seen nothing.
    """

    def __init__(self, sites: Iterable[str] = ()) -> None:
        self.sites = tuple(sites)
        self.clear()

    def clear(self) -> None:
        """Forgets the last forward."""
        self.inputs: Batch | None = None
        self.features: dict[str, Any] = {}
        self.running = False

    def __getstate__(self) -> dict[str, Any]:
        return {"sites": self.sites, "inputs": None, "features": {}, "running": False}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Puts the hooks on a model; the first one before all others, which may change the inputs."""
        layers = [(get_module(model, site), site) for site in self.sites]
        return [
            model.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            *(layer.register_forward_hook(_FeatureHook(self, site)) for layer, site in layers),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = (args, kwargs)
        self.features = {}
        self.running = True

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False


class _FeatureHook:
    """Hands the output of one layer to a recorder."""

    def __init__(self, recorder: Recorder, site: str) -> None:
        self.recorder, self.site = recorder, site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recorder.running:
            self.recorder.features[self.site] = output


def remove_recorders(model: nn.Module) -> None:
    """Takes the hooks of every Recorder off a model, also off a copy, whose hooks no handle refers to."""
    remove_hooks(model, lambda hook: isinstance(getattr(hook, "__self__", hook), Recorder | _FeatureHook))


@contextlib.contextmanager
def recording(model: nn.Module, sites: Iterable[str]) -> Iterator[Recorder]:
    """Records the forwards of the block."""
    recorder = Recorder(sites)
    handles = recorder.attach(model)
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def feature_of(output: Any, site: str, who: str) -> Tensor:
    """Returns the tensor that a layer returned, the first of several.

    Raises:
        TypeError: if there is none.
    """
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise TypeError(
            f"{who}: a layer whose features are compared must return a tensor [B, ...] of floats, got "
            f"{type(output).__name__} from {site}; name another layer in pairs"
        )
    return found
