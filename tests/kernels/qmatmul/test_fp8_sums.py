"""Tolerances of products of 8-bit floats hold for sums as Hopper's tensor cores make them, emulated here."""

import pytest
import torch

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.pack import unpack_codes
from gs_kernels.qmatmul.ref import quantize_rows_ref
from gs_kernels.qmatmul.spec import SPECS

FP8 = next(spec for spec in SPECS if spec.name == "qmatmul_fp8")
FRACTION = 13  # bits that an addend keeps behind the leading one of the largest: measured by others on H100 and H800
DEPTH = 32  # products that one instruction adds


def _exponents(t):
    return torch.frexp(t)[1].double() - 1


def _truncated(t, exponent):
    """t without what is below `2**(exponent - FRACTION)`."""
    unit = torch.exp2(exponent - FRACTION)
    return (t / unit).trunc() * unit


def tensor_core_sum(w, x, acc):
    """`acc + w @ x^T` for w [N, K] and x [M, K], each addend cut at the largest, by instructions of DEPTH."""
    for k in range(0, w.shape[1], DEPTH):
        a, b = w[:, None, k : k + DEPTH], x[None, :, k : k + DEPTH]
        products = a * b
        exponent = torch.where(products == 0, -200.0, _exponents(a) + _exponents(b)).amax(2)
        exponent = torch.maximum(exponent, torch.where(acc == 0, -200.0, _exponents(acc)))
        total = _truncated(products, exponent[..., None]).sum(2) + _truncated(acc, exponent)
        acc = _truncated(total, _exponents(total))
    return acc


def emulated(x, weight, bias, activation):
    """What `qmatmul_fp8` computes on a GPU: codes around their middle on tensor cores, the rest in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    x8, x_scale = quantize_rows_ref(rows, dtype=torch.float8_e4m3fn)
    middle = 2.0 ** (weight.bits - 1) if weight.bits > 1 else 0.5
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout).double() - middle
    y = torch.zeros(rows.shape[0], weight.shape[0])
    size = weight.group_size
    for g in range(weight.scale.shape[1]):
        part = torch.zeros(weight.shape[0], rows.shape[0], dtype=torch.float64)
        columns = slice(g * size, (g + 1) * size)
        part = tensor_core_sum(codes[:, columns], x8.double()[:, columns], part)
        zero = weight.zero[:, g, None].float() if isinstance(weight.zero, torch.Tensor) else weight.zero
        part = part.float() + (middle - zero) * x8.float()[:, columns].sum(1)
        y += (part * weight.scale[:, g, None].float()).T
    y = y * x_scale[:, None]
    y = y if bias is None else y + bias.float()
    return ACTIVATIONS[activation].function(y).to(x.dtype).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", list(FP8.tol))
@pytest.mark.parametrize("shape", FP8.test_shapes, ids=lambda s: "x".join(map(str, s["x"])))
def test_sums_of_13_bits_are_within_the_tolerance(shape, dtype):
    case = FP8.make(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    got = emulated(*case.args, case.kwargs["activation"])
    tol = FP8.tol[dtype]
    torch.testing.assert_close(got, FP8.ref(*case.args, **case.kwargs), rtol=tol.rtol, atol=tol.atol)


def test_the_emulation_cuts_what_is_13_bits_below_the_largest_addend():
    x = torch.tensor([[448.0, 2.0**-5] + [0.0] * 30], dtype=torch.float64)
    w = torch.ones(1, 32, dtype=torch.float64)
    start = torch.zeros(1, 1, dtype=torch.float64)
    assert tensor_core_sum(w, x, start).item() == 448.0 + 2.0**-5
    x[0, 1] = 2.0**-6
    assert tensor_core_sum(w, x, start).item() == 448.0
