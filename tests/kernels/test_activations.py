"""One table of activations: what each entry promises beside the function that references apply."""

import pytest
import torch

from gs_algos.fx import op_names
from gs_kernels.activations import ACTIVATIONS

NAMES = pytest.mark.parametrize("name", ACTIVATIONS)


def drawn(dtype=torch.float32):
    """Values on both sides of every bend, none on one."""
    return torch.linspace(-7.03, 7.01, 257, dtype=dtype)


@NAMES
def test_the_gradient_is_that_of_autograd(name):
    z, dy = drawn(torch.float64).requires_grad_(), torch.linspace(-1, 1, 257, dtype=torch.float64)
    # hardswish and silu compute in fp32
    (want,) = torch.autograd.grad(ACTIVATIONS[name].function(z), z, dy)
    torch.testing.assert_close(ACTIVATIONS[name].gradient(z.detach(), dy), want, rtol=1e-6, atol=1e-6)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_in_place_gives_the_bits_of_the_function(name, dtype):
    z = drawn(dtype)
    want = ACTIVATIONS[name].function(z)
    assert torch.equal(ACTIVATIONS[name].in_place(z.clone()), want)


@NAMES
def test_what_torch_calls_it_computes_it(name):
    activation, z = ACTIVATIONS[name], drawn()
    limits = (0, 6) if name == "relu6" else ()
    for call in [*activation.calls, *([activation.module()] if activation.module else [])]:
        y = call(z.clone(), *(() if isinstance(call, torch.nn.Module) else limits))
        torch.testing.assert_close(y, activation.function(z), rtol=1e-6, atol=1e-6)


def test_patterns_know_every_activation_that_kernels_apply():
    assert set(op_names.ACTIVATIONS) == set(ACTIVATIONS) - {"none"}


def test_graphs_know_the_module_of_every_activation():
    modules = {name: activation.module for name, activation in ACTIVATIONS.items() if name != "none"}
    assert {name: op_names.op_of_module(module()) for name, module in modules.items()} == {
        name: name for name in modules
    }
