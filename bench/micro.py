"""`pytest bench/micro.py`: times calls of each op on small tensors, where checks, dispatch and the launch are the cost.

With pytest-benchmark, so that `--benchmark-autosave` and `--benchmark-compare` tell two commits apart on one machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gs_kernels.runtime.opspec import OpSpec, specs

SPECS = [pytest.param(spec, id=spec.name) for spec in specs()]


@pytest.mark.parametrize("spec", SPECS)
def test_a_small_call(spec: OpSpec, benchmark: Any) -> None:
    dtype = next(iter(spec.tol))
    shape = min(spec.test_shapes, key=lambda shape: spec.cost(shape, dtype).nbytes)
    case = spec.make(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = benchmark(spec.run, *case.args, **case.kwargs)
    assert got is not None
