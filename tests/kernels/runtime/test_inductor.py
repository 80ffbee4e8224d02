"""Code that one process compiled and left in the cache is right in another, whatever vectors that one may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiled for the CPU")

ACTIVATE = """
import torch
from gs_kernels import requantize

codes = torch.arange(-128, 128).repeat(256).to(torch.int8)
for _ in range(3):  # what is written past the end of a result ends the process, here or when memory is freed
    y = requantize(codes, torch.full((1,), 0.25), torch.zeros(1), activation="hardswish")
assert torch.allclose(y, torch.nn.functional.hardswish(codes.float() * 0.25), atol=1e-5)
"""


def test_a_cache_filled_with_narrow_vectors_or_none_serves_a_process_with_wide_ones(tmp_path: Path):
    root = str(Path(__file__).parents[3])
    about = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    for capability in ("default", "avx2", ""):
        more = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run([sys.executable, "-c", ACTIVATE], env={**about, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
