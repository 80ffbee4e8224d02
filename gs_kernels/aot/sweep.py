"""Tries integer arguments of kernels as the constant 1 and as 64-bit numbers: what launches make of 1 and of 2**31.

A launch turns an integer that is 1 into a constant, which is no tensor and has no `.to`; a kernel that was only ever
launched with 2 and more fails there. The compiler's front end finds it, in some hundredths of a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gs_kernels.aot.collect import Specialization, collect, spec_call
from gs_kernels.runtime.opspec import OpSpec

INTEGERS = ("i32", "i64")


def spec_kernels(specs: Iterable[OpSpec], target: str) -> list[Specialization]:
    """Collects what the test shapes of ops, in all dtypes, would have Triton compile, each kernel once."""
    found: dict[tuple[Any, str], Specialization] = {}
    for spec in specs:
        for shape in spec.test_shapes:
            for dtype in spec.tol:
                generator = torch.Generator().manual_seed(0)
                case = spec.make(shape, dtype, torch.device("cpu"), generator)
                for kernel in collect(spec_call(spec, case), target):
                    found.setdefault((kernel.fn, kernel.key), kernel)
    return list(found.values())


def forced(kernels: Iterable[Specialization], every: bool = True) -> Iterator[tuple[str, Specialization]]:
    """Yields kernels with integer arguments forced to 1 or to 64 bits, and what was done to each.

    Args:
        every: force each argument of each kernel by itself, and all of them. Else of each function only some kernels
            are taken, in which every flag has every kind of value; all arguments of them are forced at once, and each
            by itself in one of them.
    """
    by_function: defaultdict[Any, list[Specialization]] = defaultdict(list)
    for kernel in kernels:
        by_function[kernel.fn].append(kernel)
    for variants in by_function.values():
        chosen = variants if every else sample(variants)
        for kernel in chosen:
            arguments = [name for name, type_ in kernel.signature.items() if type_ in INTEGERS]
            yield _forced(kernel, arguments, "constexpr")
            yield _forced(kernel, arguments, "i64")
        turn = 0
        for name in variants[0].signature:
            for type_ in ("constexpr", "i64"):
                takes = [kernel for kernel in chosen if kernel.signature[name] in INTEGERS]
                for i in range(len(takes)) if every else range(min(len(takes), 1)):
                    yield _forced(takes[(turn + i) % len(takes)], [name], type_)
                turn += 1


def _forced(kernel: Specialization, names: Sequence[str], type_: str) -> tuple[str, Specialization]:
    done = f"{kernel.name} with {', '.join(names)} {'= 1' if type_ == 'constexpr' else 'of 64 bits'}"
    for name in names:
        kernel = kernel.with_argument(name, type_, 1)
    return done, kernel


def sample(variants: Sequence[Specialization]) -> list[Specialization]:
    """Chooses some of the variants of a kernel that together hold each kind of value that an argument has in any."""
    kinds = {id(kernel): set(_kinds(kernel)) for kernel in variants}
    missing, chosen = set().union(*kinds.values()), []
    while missing:
        best = max(variants, key=lambda kernel: len(kinds[id(kernel)] & missing))
        missing -= kinds[id(best)]
        chosen.append(best)
    return chosen


def _kinds(kernel: Specialization) -> Iterator[tuple[str, Any]]:
    """Yields for each argument its type or, of a constant, its value; of a number whether it is 0, 1 or more."""
    yield from ((name, type_) for name, type_ in kernel.signature.items() if type_ != "constexpr")
    names = list(kernel.signature)
    for path, value in kernel.constexprs.items():
        number = not isinstance(value, bool) and isinstance(value, int | float)
        yield names[path[0]], min(value, 2) if number else value


def sweep(kernels: Iterable[Specialization], every: bool = True) -> list[str]:
    """Lists the forced kernels that the front end of the compiler refuses, with its last words; empty if none."""
    from triton.compiler import CompilationError

    failures = []
    for done, kernel in forced(kernels, every):
        try:
            kernel.lower("source")
        except CompilationError as error:
            failures.append(f"{done}: {str(error).strip().splitlines()[-1]}")
    return failures
