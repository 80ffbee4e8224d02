"""No kernel, in C++ or in Triton, touches what lies outside its tensors, also where a mask on the result hides it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STRAY = """
import ctypes, torch
from tests.kernels.guard import guarded
t = guarded(torch.ones(3), at_end=True)
assert t.tolist() == [1.0, 1.0, 1.0]
ctypes.c_float.from_address(t.data_ptr() + t.nbytes).value
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory as Linux does")


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_read_past_the_end_of_a_guarded_tensor_ends_the_process():
    assert python("-c", STRAY).returncode == -signal.SIGSEGV


def test_no_kernel_touches_what_lies_outside_its_tensors():
    run = python("-m", "tests.kernels.guard")
    at = (run.stdout.splitlines() or ["the start"])[-1]
    assert run.returncode == 0, f"exit {run.returncode} at {at}: {run.stderr[-600:]}"
    assert run.stdout.count("\n") > 20
