"""Checks that every launch that the tile rules can choose fits the shared memory of a GPU, without machine code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gs_kernels.aot.collect import Specialization, collect
from gs_kernels.aot.sweep import spec_kernels
from gs_kernels.aot.targets import find_target
from gs_kernels.qmatmul.op_fp8 import SM as FP8_SM
from gs_kernels.runtime.opspec import OpSpec

SAMPLED = ("sm_89", "sm_90", "sm_120")  # sm_80 and sm_100 lay memory out as sm_89 and sm_90, which have no more of it
TARGETS = (*SAMPLED, "sm_80", "sm_100")


def launches(specs: Iterable[OpSpec], target: str, every: bool) -> Iterator[tuple[str, Specialization]]:
    """Yields the kernels that the ops' regimes launch on a target, each once, with the first that does.

    every: all regimes, and the kernels of the test shapes.
    """
    seen: set[tuple[Any, str]] = set()
    chosen = [spec for spec in specs if spec.regimes is not None or every]
    for spec in chosen:
        named = [] if spec.regimes is None else list(spec.regimes(every))
        found = [(name, kernel) for name, call in named for kernel in collect(call, target)]
        if every:
            found += [("test shapes", kernel) for kernel in spec_kernels([spec], target)]
        for name, kernel in found:
            if (kernel.fn, kernel.key) not in seen and _is_allowed(kernel):
                seen.add((kernel.fn, kernel.key))
                yield f"{spec.name}/{name}", kernel


def _is_allowed(kernel: Specialization) -> bool:
    """Returns whether ops launch a kernel on its target: they refuse 8-bit floats where no GPU multiplies them."""
    return kernel.target.arch >= FP8_SM or "fp8e4nv" not in str(kernel.signature)


def check_shared(specs: Iterable[OpSpec], target: str, every: bool) -> Iterator[tuple[str, str, int, str]]:
    """Yields launch, kernel, bytes of shared memory of a block, and what is wrong with that ("" if nothing).

    Args:
        target: an NVIDIA name of `gs_kernels.aot.TARGETS`.
        every: all regimes of the rules, else some of each kind.
    """
    most = find_target(target).shared_per_block
    for name, kernel in launches(specs, target, every):
        nbytes = kernel.shared_bytes()
        wrong = f"must take at most {most} bytes of shared memory, got {nbytes}" if nbytes > most else ""
        yield name, kernel.name, nbytes, wrong
