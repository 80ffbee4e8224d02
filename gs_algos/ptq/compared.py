"""Compares packed layers with the rounded ones in whose place they are, as the network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.compare import relative_error
from gs_algos.core.modules import get_module

LAYER_TOLERANCE = {  # relative error of packed products against float ones
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@contextmanager
def compared(network: nn.Module, before: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[float, float]]]:
    """Collects the relative errors of packed layers, as the network runs, and what each may be.

    Layer by layer on the same input: where rows are rounded as they run, what a last bit changes in one layer becomes
    other codes in those behind it, so the outputs of two networks differ by as much as that rounding costs.

    before: the layers in whose place they are.
    """
    errors: dict[str, tuple[float, float]] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, got: Tensor) -> None:
            want = before[name].forward(*args, **kwargs)
            error = max(relative_error(got, want), errors.get(name, (0.0, 0.0))[0])
            errors[name] = error, LAYER_TOLERANCE.get(want.dtype, 1e-1)

        return hook

    with ExitStack() as stack:
        for name in before:
            hook = get_module(network, name).register_forward_hook(compare(name), with_kwargs=True)
            stack.callback(hook.remove)
        yield errors
