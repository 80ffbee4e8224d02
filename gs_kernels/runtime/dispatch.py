"""Chooses the implementation of an op that runs a call, and tells why the others do not.

An op lists its implementations fastest first; each can refuse a call with reasons. The first that does not refuse runs.
The environment variable `GS_BACKEND` forces one by name. This is the only file that reads the environment:
`GS_TUNING_DIR` is the other variable of ours; `variable` reads those of compilers and PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from gs_kernels.runtime import device
from gs_kernels.runtime.bound_calls import note_launch
from gs_kernels.runtime.torch_private import is_eager

logger = logging.getLogger(__name__)

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

# what os.environ keeps names and values in: its own `get` takes 0.7 to 1.4 us, half of a small choice
_environment: Any = getattr(os.environ, "_data", os.environ)
_BACKEND, _CPU = map(os.environ.encodekey, ("GS_BACKEND", "cpu"))
backend_setting: Callable[[], Any] = partial(_environment.get, _BACKEND)  # to compare: what was chosen then still holds

_logged: set[tuple[str, str]] = set()
_meta_runs_kernels = False


class UnsupportedError(RuntimeError):
    """Says that a call is right, but no implementation can run it here."""


@dataclass(frozen=True)
class Impl:
    """Holds one implementation of an op.

    Args:
        refuses: `refuses(*args)` returns why it cannot run a call; empty if it can.
        prepare: makes what a layer holds, and calls often, of the arguments that stay; None if it has no such thing.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., list[str]]
    prepare: Callable[..., Any] | None = None


def choose(op: str, impls: Sequence[Impl], *args: Any) -> Impl:
    """Returns the first implementation that accepts `args`; logs once when it is not the first of the list.

    Raises:
        UnsupportedError: if every implementation refuses, with all the reasons; or GS_BACKEND names one that does.
    """
    if backend_setting():
        forced = os.environ["GS_BACKEND"]
        names = [impl.name for impl in impls]
        if forced not in names:
            raise UnsupportedError(f"{op}: GS_BACKEND must be one of {', '.join(names)}, got {forced!r}; unset it")
        impls = [impls[names.index(forced)]]
    refusals: list[tuple[str, list[str]]] = []
    for impl in impls:
        reasons = impl.refuses(*args)
        if not reasons:
            if refusals and (op, impl.name) not in _logged:
                _logged.add((op, impl.name))
                logger.info("%s runs as '%s': %s", op, impl.name, _sentence(refusals))
            return impl
        refusals.append((impl.name, reasons))
    raise UnsupportedError(f"{op}: no implementation can run this call: {_sentence(refusals)}")


def _sentence(refusals: list[tuple[str, list[str]]]) -> str:
    return "; ".join(f"{name} {reason}" for name, reasons in refusals for reason in reasons)


def variable(*names: str) -> str:
    """Reads the first of these environment variables that is set and not empty; "" if none is."""
    return next((value for name in names if (value := os.environ.get(name, ""))), "")


def tuning_dir() -> Path | None:
    """Returns the folder of the user's own tables of tiles, `GS_TUNING_DIR`."""
    folder = os.environ.get("GS_TUNING_DIR")
    return Path(folder) if folder else None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_refuses(x: torch.Tensor, *_: object) -> list[str]:
    if not _has_triton():
        return ["needs the triton package"]
    if INTERPRET:
        return [] if is_eager(x) else ["needs real tensors under TRITON_INTERPRET=1"]
    runs = device.on_gpu(x) or (_meta_runs_kernels and x.is_meta)
    return [] if runs else [f"needs a CUDA tensor, got {x.device.type}"]


@contextlib.contextmanager
def meta_tensors_run_kernels() -> Iterator[None]:
    """Makes meta tensors inside count as those of a GPU, for gs_kernels.aot, which keeps kernels from launching."""
    global _meta_runs_kernels
    before, _meta_runs_kernels = _meta_runs_kernels, True
    try:
        yield
    finally:
        _meta_runs_kernels = before


def cpu_refuses(x: torch.Tensor, *_: object) -> list[str]:
    return [] if x.is_cpu and is_eager(x) else ["needs a CPU tensor outside any tracing"]


def takes_cpu(x: torch.Tensor) -> bool:
    """Returns whether an op with x would take its CPU path, for callers that take that path without the op."""
    return not INTERPRET and x.is_cpu and (backend_setting() or _CPU) == _CPU and is_eager(x)


def never(*_: object) -> list[str]:
    return []


def implementations(
    name: str,
    ref: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    refuses: Callable[..., list[str]] = triton_refuses,
    prepare_cpu: Callable[..., Any] | None = None,
) -> tuple[Impl, ...]:
    """Lists, fastest first: `<name>_triton` of the `kernel.py` beside ref, imported once chosen; cpu, if any; ref.

    refuses: when the Triton kernels cannot run a call. prepare_cpu: `Impl.prepare` of cpu.
    """
    module = ref.__module__.rpartition(".")[0] + ".kernel"

    def triton(*args: Any) -> Any:
        return getattr(importlib.import_module(module), f"{name}_triton")(*args)

    impls = [Impl("triton", triton, refuses), Impl("ref", ref, never)]
    if cpu is not None:
        impls.insert(1, Impl("cpu", cpu, cpu_refuses, prepare_cpu))
    return tuple(impls)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, early: Any = False, **flags: Any) -> None:
    """Launches `kernel[grid](*args, **flags)` on the device of args[0], a * b + c not contracted.

    While tracing, the launch goes through `wrap_triton`, so that `torch.compile` and AOTInductor see it. That knows no
    `enable_fp_fusion`: kernels are written so that contraction changes no element, only the last bits of sums.

    early: whether to start while the launch before still runs, once that allows it (compute capability 9.0 and above):
        the kernel waits by itself, with `gdc_wait`, before it reads what that writes. Not while tracing.
    """
    out: torch.Tensor = args[0]
    if not is_eager(out):
        torch.library.wrap_triton(kernel)[grid](*args, **flags)
        return
    options = {"enable_fp_fusion": False, "launch_pdl": True} if early else {"enable_fp_fusion": False}
    if device.on_gpu(out) and (index := device.index_of(out)) != device.current_index():
        with torch.cuda.device(index):
            compiled = kernel[grid](*args, **options, **flags)
    else:
        compiled = kernel[grid](*args, **options, **flags)
    note_launch(kernel, compiled, grid, args, flags)
