"""Multiplies float rows with a packed weight in 8-bit floats: implementation, registration, public function."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.pack.checks import FLOATS
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qmatmul.checks import check_operands
from gs_kernels.qmatmul.op import planar_refuses
from gs_kernels.qmatmul.ref import qmatmul_fp8_ref
from gs_kernels.runtime.device import capabilities
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager

SM = 89  # the first compute capability that multiplies 8-bit floats
BITS = 4  # at most: whole numbers up to 15 are exact in float8_e4m3


def _refuses(x: Tensor, weight: PackedWeight, *_: object) -> list[str]:
    reasons = planar_refuses(x, weight)
    if x.device.type == "cuda" and is_eager(x) and capabilities(x.device.index or 0).sm < SM:
        reasons.append("needs a GPU that multiplies float8_e4m3 (compute capability 8.9)")
    return reasons


def _fp8_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    return qmatmul_fp8_ref(x, weight, bias, activation=activation)


FP8 = implementations("qmatmul_fp8", _fp8_ref, refuses=_refuses)


def _fp8_fake(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_run = register(
    "qmatmul_fp8(Tensor x, PackedWeight weight, Tensor? bias, str activation) -> Tensor",
    FP8,
    _fp8_fake,
    carried=(PACKED_WEIGHT,),
)


def qmatmul_fp8(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`act(x8 @ W^T + bias)` where x8 is x with each row rounded to float8_e4m3 with a scale of its own. No gradient.

    For many rows on GPUs whose 8-bit float products are twice as fast (compute capability 8.9 and above); elsewhere it
    gives the same numbers, slowly. Codes of the weight are exact in float8_e4m3; scales, zero points, bias and
    activation are applied in fp32. x is rounded to 3 bits behind the first: for networks that were not trained with
    int8 activations, whose codes are not exact here (`qmatmul_int8`).

    Args:
        x: `[..., K]` fp32 / fp16 / bf16, any strides.
        weight: `[N, K]`, at most 4 bits, without levels.
        bias: `[N]` fp32 / fp16 / bf16.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.

    Returns:
        `[..., N]`, dtype of x, contiguous.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or the weight has levels or 8 bits.
    """
    if (y := _run.repeat(x, weight, bias, activation)) is not None:
        return y
    check_operands("qmatmul_fp8", x, FLOATS, weight, bias, activation)
    if weight.levels is not None:
        raise ValueError("qmatmul_fp8: weight must have an evenly spaced grid, got levels; use qmatmul")
    if weight.bits > BITS:
        raise ValueError(f"qmatmul_fp8: weight must have at most {BITS} bits, got {weight.bits}; use qmatmul_int8")
    return _run(x.detach(), weight, bias, activation)
