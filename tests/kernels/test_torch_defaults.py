"""A default dtype or device that the program has set changes no op, and no self-test of the C++.

`torch.set_default_dtype(torch.bfloat16)` is how language models are loaded, and `torch.set_default_device("cuda")` is
set beside networks that run on the CPU; meta stands for another device. C++ gets the addresses of new tensors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from gs_kernels.runtime.opspec import OpSpec, specs
from tests.helpers import same_bits, tensors


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device_name", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_ops_give_the_same_bits(spec: OpSpec, dtype: torch.dtype, device_name: str, device):
    made = torch.float32 if torch.float32 in spec.tol else next(iter(spec.tol))

    def run(setting: Any) -> list[torch.Tensor]:
        found = []
        for shape in spec.test_shapes:  # arguments anew: what is derived from a weight is kept with it
            case = spec.make(shape, made, device, torch.Generator(device=device).manual_seed(0))
            with setting():
                found += tensors(spec.run(*case.args, **case.kwargs))
        return found

    @contextmanager
    def changed() -> Iterator[None]:
        with default_dtype(dtype), torch.device(device_name):
            yield

    want, got = run(nullcontext), run(changed)
    for y, wanted in zip(got, want, strict=True):
        assert y.device == wanted.device and y.dtype == wanted.dtype and same_bits(y, wanted)


@pytest.mark.parametrize("defaults", ["torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"])
def test_the_self_tests_of_the_cpp_pass(defaults: str):
    program = f"""
import torch
from gs_kernels import pack_weight, qconv2d, qmatmul
from gs_kernels.cpu.library import problems

one = dict(dtype=torch.float32, device="cpu")
weight = pack_weight(torch.ones(4, 32, dtype=torch.uint8), torch.ones(4, 1, **one), bits=8, group_size=32)
x, image = torch.ones(2, 32, **one), torch.ones(1, 32, 3, 3, **one)
{defaults}
assert qmatmul(x, weight).dtype == torch.float32
assert qconv2d(image, weight, kernel_size=1).shape == (1, 4, 3, 3)
print(problems())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([])
