"""Which implementation of an op runs, and why the others do not.

An op lists its implementations fastest first; each can refuse a call with reasons. The first that does not refuse runs.
The environment variable `GS_BACKEND` forces one by name. This is the only file that reads the environment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

_said: set[tuple[str, str]] = set()


class UnsupportedError(RuntimeError):
    """The call is right, but no implementation can run it here."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op: `refuses(*args)` returns the reasons why it cannot run this call (empty: it can)."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., list[str]]


def choose(op: str, impls: Sequence[Impl], *args: Any) -> Impl:
    """The first implementation that accepts `args`; logs once when it is not the first of the list.

    Raises:
        UnsupportedError: if every implementation refuses, with all the reasons; or GS_BACKEND names one that does.
    """
    forced = os.environ.get("GS_BACKEND")
    if forced and forced not in {impl.name for impl in impls}:
        raise UnsupportedError(
            f"{op}: GS_BACKEND must be one of {', '.join(impl.name for impl in impls)}, got {forced!r}; unset it"
        )
    refusals: list[str] = []
    for impl in impls:
        if forced and impl.name != forced:
            continue
        reasons = impl.refuses(*args)
        if not reasons:
            if refusals and (op, impl.name) not in _said:
                _said.add((op, impl.name))
                logger.info("%s runs as '%s': %s", op, impl.name, "; ".join(refusals))
            return impl
        refusals += [f"{impl.name} {reason}" for reason in reasons]
    raise UnsupportedError(f"{op}: no implementation can run this call: {'; '.join(refusals)}")


def is_eager(*tensors: torch.Tensor) -> bool:
    """True if these are real tensors outside any tracing: only then may a body call compiled code or look at values."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    )


def launchable(kernel: Any) -> Any:
    """The kernel, wrapped so that `torch.compile` and AOTInductor see the launch; unwrapped under the interpreter."""
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)
