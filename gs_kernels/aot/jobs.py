"""Compiles and checks cases of ops, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias

from gs_kernels.aot.report import Report, check, reports
from gs_kernels.runtime.opspec import AotCase, OpSpec, specs

Work: TypeAlias = tuple[OpSpec, int, str]  # an op, which of its cases, the target
Checked: TypeAlias = list[tuple[Report, list[str]]]  # each kernel, and what is out of bounds


@contextmanager
def compilers(jobs: int) -> Iterator[Callable[[Sequence[Work]], Iterable[Checked]]]:
    """Yields what compiles and checks a list of cases, in their order, by so many processes."""
    if jobs == 1:
        yield lambda work: (_checked(spec.aot[i], target) for spec, i, target in work)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda work: pool.map(_checked_there, [(spec.name, i, target) for spec, i, target in work])


def _checked(case: AotCase, target: str) -> Checked:
    return [(kernel, check(kernel, case)) for kernel in reports(case, target)]


def _checked_there(work: tuple[str, int, str]) -> Checked:
    """Does so in a process that is handed the name of the op alone: cases hold functions."""
    op, number, target = work
    (spec,) = (spec for spec in specs() if spec.name == op)
    return _checked(spec.aot[number], target)
