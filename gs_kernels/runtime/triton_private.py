"""Collects what gs_kernels uses from inside Triton, checked with versions 3.6, 3.8 and 3.9.

Its JIT binds arguments, looks for what they have in common with those of calls before, and finds the compiled kernel by
that, in 15 to 25 us a launch. A call that is known to be like one before can have the compiled kernel itself. No other
file relies on how a version of Triton does that.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

FIRST, LAST = (3, 6), (3, 9)  # versions whose compiled kernels take arguments as `launcher` gives them



@cache
def launches_directly() -> bool:
    """Returns whether compiled kernels can be launched without the JIT here; logs once why not."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    why = ""
    if not FIRST <= version <= LAST:
        why = f"Triton {triton.__version__} is not one of {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
    elif torch.version.hip is not None:
        why = "kernels for AMD are also specialized by the size of the memory that a tensor is part of"
    if why:
        logger.info("every launch goes through Triton's JIT, some 20 us of CPU time more: %s", why)
    return not why


# settings that change what a launch compiles, and can change while a process runs, of what `settings` returns
SETTINGS = ("runtime.debug", "compilation.instrumentation_mode", "runtime.add_stages_inspection_hook")


@cache
def settings() -> tuple[Any, Any]:
    """Returns Triton's settings at run time and of the compiler."""
    from triton import knobs

    return knobs.runtime, knobs.compilation


def current_stream(index: int) -> int:
    """Returns the stream that a launch would go into now, on a GPU."""
    from triton.runtime import driver

    return driver.active.get_current_stream(index)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Launch:
    """Holds a launch of a compiled kernel.

    pick: takes the first arguments, pointers, from a list of values. rest: what comes behind them, constants too.
    """

    compiled: Any
    grid: tuple[int, int, int]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    rest: tuple[Any, ...]


def can_launch(kernel: Any, compiled: Any) -> bool:
    """Returns whether `launcher` may launch what `kernel[grid](...)` returned, or only the JIT may.

    Of what the JIT does in each launch it leaves out the comparison of the module constants that the kernel uses with
    those it was compiled with.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    return isinstance(kernel, JITFunction) and not kernel.pre_run_hooks and isinstance(compiled, CompiledKernel)


def launcher(launches: Sequence[Launch]) -> Callable[[int, Sequence[Any]], None]:
    """Returns `launch(index, values)`, which launches these on the present GPU, whose index is given."""
    from triton.runtime import driver

    runtime, _ = settings()
    stream_of = driver.active.get_current_stream
    hooked = [(launch.compiled[launch.grid], launch.pick, launch.rest) for launch in launches]  # loads kernels, too
    direct = [
        (c.run, *launch.grid, c.function, c.packed_metadata, launch.pick, launch.rest)
        for launch in launches
        for c in (launch.compiled,)
    ]

    def launch(index: int, values: Sequence[Any]) -> None:
        stream, enter, leave = stream_of(index), runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains of hooks, mostly empty
            for run, pick, rest in hooked:
                run(*pick(values), *rest, stream=stream)
        else:
            for run, x, y, z, function, metadata, pick, rest in direct:
                run(x, y, z, stream, function, metadata, None, None, None, *pick(values), *rest)

    return launch
