"""Fixtures that several test folders share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.record import device_name
from gs_kernels.runtime.instructions import described
from tests.helpers import DEVICE, poisoned_outputs

FOLDER = Path(__file__).parent


def pytest_report_header() -> str:
    """What the suite runs on."""
    threads = torch.get_num_threads()
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"CPU: {device_name('cpu')}, {described()}, {threads} threads, torch {torch.__version__}{gpu}"


def pytest_collection_finish() -> None:
    """Has garbage looked for less often, and not among what was imported: a tenth of the suite's time went into it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at the end of a process of objects that are left


@pytest.fixture(scope="session", autouse=True)
def many_networks_compile() -> None:
    """Lets `torch.compile` take as many networks of one class as the tests of a process have: behind the eighth, a
    forward of `nn.Sequential` would run as it is, and `fullgraph=True` refuse it.
    """
    torch._dynamo.config.recompile_limit = 256


@pytest.fixture(scope="module", autouse=True)
def kernels_run_on_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives tests of C++ kernels two threads at least, though a process of the suite may have one (OMP_NUM_THREADS)."""
    before, folder = torch.get_num_threads(), request.path.relative_to(FOLDER).as_posix()
    if folder.startswith(("kernels/", "quant/integer/")):
        torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def networks_are_timed_by_few_calls() -> Iterator[None]:
    """Has commands and reports time five calls, not a second of them: no test asks how long a network takes."""
    from gs_algos.analysis.analyze import report
    from gs_algos.analysis.effect import effect
    from gs_algos.analysis.latency import layer_times
    from gs_algos.core.timing import forward_ms

    with pytest.MonkeyPatch.context() as patch:
        for function in (report, effect, layer_times):
            patch.setitem(function.__kwdefaults__, "seconds", 0.0)
        patch.setattr(forward_ms, "__defaults__", (0.0,))
        yield


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one and kernels compile, else the CPU."""
    return DEVICE


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialized tensor is NaN."""
    with poisoned_outputs():
        yield
