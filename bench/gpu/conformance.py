"""Runs the conformance tests as a step: pytest runs in this process, each test is an item that ends with its result."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gs_kernels.aot.collect import spec_call
from gs_kernels.runtime.opspec import map_tensors, specs

FILE = Path(__file__).parents[2] / "tests" / "kernels" / "test_conformance.py"
Emit = Callable[[dict[str, Any]], None]


class Reporter:
    """Tells, as a plugin of pytest, what is planned, begins and ends, and stops at the deadline."""

    def __init__(self, wanted: Sequence[str] | None, deadline: float, dry: bool, emit: Emit) -> None:
        self.wanted, self.deadline, self.dry, self.emit = wanted, deadline, dry, emit
        self.started = 0.0
        self.found: tuple[str, str] = ("skipped", "did not run")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            wanted = set(self.wanted)
            items[:] = [item for item in items if self.name(item.nodeid) in wanted]
        self.emit({"event": "planned", "items": [self.name(item.nodeid) for item in items]})

    @staticmethod
    def name(nodeid: str) -> str:
        return "conformance/" + nodeid.partition("::")[2]

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        name = self.name(item.nodeid)
        if time.monotonic() > self.deadline:
            self.end(name, "skipped", "the time of its step was used up")
            return True
        self.emit({"event": "start", "item": name})
        self.started, self.found = time.monotonic(), ("skipped", "did not run")
        if self.dry:
            self.end(name, "done", "")
            return True
        return None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.found = ("failed", " ".join(line[2:].strip() for line in lines)[:300] or "failed")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
            self.found = ("skipped", str(reason)[:300])
        elif report.when == "call":
            self.found = ("done", "")
        if report.when == "teardown":
            self.end(self.name(report.nodeid), *self.found)

    def end(self, item: str, result: str, why: str) -> None:
        seconds = round(time.monotonic() - self.started, 3) if self.started else 0.0
        self.emit({"event": "end", "item": item, "result": result, "why": why, "seconds": seconds})


def run_tests(wanted: Sequence[str] | None, deadline: float, dry: bool, emit: Emit) -> None:
    """Runs the tests of these names, or all.

    Raises:
        RuntimeError: if pytest could not collect them.
    """
    import pytest

    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    code = pytest.main([str(FILE), *options], plugins=[Reporter(wanted, deadline, dry, emit)])
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest must collect {FILE}, got exit code {int(code)}; see the log")


def launches() -> Iterator[Callable[[], None]]:
    """Yields calls with meta tensors that launch what the tests launch: every shape, type and layout.

    Gradients of results are contiguous, as behind a fence, and in the test of two runs laid out as the results.
    """
    fenced = importlib.import_module("tests.helpers").fenced
    dtypes = importlib.import_module("tests.kernels.test_conformance").DTYPES
    cpu = torch.device("cpu")
    for spec in specs():
        for shape in spec.test_shapes:
            for dtype in (dtype for dtype in dtypes if dtype in spec.tol):
                strided = dtype == torch.float32 and len(shape["x"]) >= 2
                for layout in ("dense", "sliced", "reversed", "spread") if strided else ("dense",):
                    case = spec.make(shape, dtype, cpu, torch.Generator().manual_seed(0))
                    of_x, others = partial(fenced, layout=layout), fenced
                    args = [map_tensors(of_x if i == 0 else others, a) for i, a in enumerate(case.args)]
                    call = partial(spec_call, spec, type(case)(tuple(args), case.kwargs, case.grad_args))
                    yield call(torch.contiguous_format)
                    if case.grad_args and dtype == torch.float32 and layout == "dense":
                        yield call()
