"""Every op against its reference: fenced inputs, poisoned outputs, every layout, gradients, determinism.

Runs the CPU path in a plain process, the Triton kernels with TRITON_INTERPRET=1, and on the GPU where there is one.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import Case, OpSpec, Shape, map_tensors, specs
from tests.helpers import fenced, gradients, relative_rms, same_bits, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _name(shape: Shape) -> str:
    sizes = "x".join(str(n) for n in shape["x"]) or "scalar"
    owner = f"group{shape['group']}" if shape["group"] else f"axis{shape['axis']}" if shape["axis"] >= 0 else "tensor"
    weight = f"-{shape['n']}x{shape['bits']}bit-{shape['zero']}" if "bits" in shape else ""
    return f"{sizes}{weight}-{owner}"


def _params(dtypes: tuple[torch.dtype, ...], axes: int = 0) -> list[object]:
    return [
        pytest.param(spec, shape, dtype, id=f"{spec.name}-{_name(shape)}-{str(dtype).removeprefix('torch.')}")
        for spec in specs()
        for shape in spec.test_shapes
        for dtype in dtypes
        if dtype in spec.tol and len(shape["x"]) >= axes
    ]


def _leaves(case: Case, layout: str) -> tuple[tuple[object, ...], list[torch.Tensor]]:
    """Arguments behind a fence, and those of them that want a gradient. x alone takes the layout."""
    args = [map_tensors(partial(fenced, layout=layout if i == 0 else "dense"), a) for i, a in enumerate(case.args)]
    leaves = [args[i].requires_grad_() for i in case.grad_args]
    return tuple(args), leaves


def tensors_in(args: tuple[object, ...]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for a in args:
        map_tensors(lambda t: found.append(t) or t, a)
    return found


def _agrees_with_reference(spec: OpSpec, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    generator = torch.Generator(device=device).manual_seed(0)
    case = spec.make(shape, dtype, device, generator)
    args, leaves = _leaves(case, layout)
    plain = [map_tensors(torch.clone, a) for a in case.args]
    plain_leaves = [plain[i].requires_grad_() for i in case.grad_args]
    want = tensors(spec.ref(*plain, **case.kwargs))
    got = tensors(spec.run(*args, **case.kwargs))

    for y, wanted in zip(got, want, strict=True):
        tol = spec.tol[dtype]
        torch.testing.assert_close(y, wanted, rtol=tol.rtol, atol=tol.atol, equal_nan=True, check_stride=False)
        if not spec.keeps_strides:
            assert y.is_contiguous(memory_format=spec.memory_format)
        elif y.shape == args[0].shape:
            assert y.stride() == torch.empty_like(args[0]).stride()
    if leaves:
        dys = [torch.randn(y.shape, generator=generator, device=device).to(y.dtype) for y in want]
        found = gradients(got, leaves, [fenced(dy) for dy in dys])
        wanted_grads = gradients(want, plain_leaves, dys)
        for leaf, grad, wanted in zip(leaves, found, wanted_grads, strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
            assert relative_rms(grad, wanted) <= spec.grad_tol[dtype]
    before = tensors_in(case.args)
    for a, b in zip(tensors_in(args), before, strict=True):
        assert same_bits(a, b), "an op must not write to its inputs"


@pytest.mark.parametrize("spec, shape, dtype", _params(DTYPES))
def test_op_agrees_with_its_reference(spec: OpSpec, shape: Shape, dtype: torch.dtype, device, poisoned):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("TRITON_INTERPRET=1: the interpreter's bf16 casts truncate; bf16 runs on a GPU")
    _agrees_with_reference(spec, shape, dtype, "dense", device)


@pytest.mark.parametrize("layout", ["sliced", "reversed", "spread"])
@pytest.mark.parametrize("spec, shape, dtype", _params((torch.float32,), axes=2))
def test_op_agrees_with_its_reference_on_strided_input(spec, shape, dtype, layout, device, poisoned):
    _agrees_with_reference(spec, shape, dtype, layout, device)


@pytest.mark.parametrize("spec, shape, dtype", _params((torch.float32,)))
def test_two_runs_give_the_same_bits(spec, shape, dtype, device):
    def once() -> list[torch.Tensor]:
        generator = torch.Generator(device=device).manual_seed(0)
        args, leaves = _leaves(spec.make(shape, dtype, device, generator), "dense")
        ys = tensors(spec.run(*args, **spec.make(shape, dtype, device, generator).kwargs))
        dys = [torch.ones_like(y) for y in ys]
        return [*ys, *(gradients(ys, leaves, dys) if leaves else ())]

    assert all(same_bits(a, b) for a, b in zip(once(), once(), strict=True))


def test_uninitialized_memory_is_poisoned_in_these_tests(poisoned, device):
    assert torch.empty(3, device=device).isnan().all()
    assert (torch.empty(3, dtype=torch.int8, device=device) == 127).all()
