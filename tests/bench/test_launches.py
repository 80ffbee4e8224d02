"""Adds: the pretended GPU runs calls through Triton's own launchers, into a libcuda that does nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from gs_kernels.runtime.dispatch import INTERPRET

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")


@pytest.mark.skipif(INTERPRET or shutil.which("cc") is None, reason="needs kernels that compile, and a C compiler")
def test_a_bound_call_reaches_the_driver_once_in_few_frames():
    command = [sys.executable, "-m", "bench.launches", "--seconds", "0.01", "--only", "fake_quant by row"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    us, launches, frames, _ = lines[-1].removeprefix("fake_quant by row").split()
    assert float(us) > 0 and int(launches) == 1 and int(frames) <= 24
