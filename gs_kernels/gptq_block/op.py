"""Rounding columns in turn: implementations, registration, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import check_grid
from gs_kernels.gptq_block.cpu import gptq_block_cpu
from gs_kernels.gptq_block.ref import gptq_block_ref
from gs_kernels.pack.checks import check_tensor
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register

WHO = "gptq_block"
COLUMNS_MAX = 128  # that a program keeps in registers


def _gptq_block_ref(
    values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    return gptq_block_ref(values, start, factor, scale, zero, qmin=qmin, qmax=qmax)


def _gptq_block_fake(values: Tensor, *_: object) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


GPTQ_BLOCK = implementations("gptq_block", _gptq_block_ref, gptq_block_cpu)
_run = register(
    "gptq_block(Tensor values, Tensor start, Tensor factor, Tensor scale, Tensor? zero, int qmin, int qmax) -> Tensor",
    GPTQ_BLOCK,
    _gptq_block_fake,
)


def gptq_block(
    values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None = None, *, qmin: int, qmax: int
) -> Tensor:
    """Rounds columns j in turn to `q_j = nearest(values_j - sum_(i < j) (q_i - start_i) F_ij)`; returns `q - start`.

    The nearest is `(clamp(round(v / s) + z, qmin, qmax) - z) * s`, rounded half to even. With the factor of a Hessian
    this is a block of GPTQ; with `F_ij = H_ij / H_jj` it is coordinate descent from start. Products and sums are
    rounded one by one, in the order of i, in fp32: every implementation gives the same bits. No gradient.

    Args:
        values: `[columns, groups, n]` fp32: what each column would be without the columns of this block before it, at
            most 128; groups of n rows have factors of their own. Here and below, what is not contiguous is copied.
        start: shape of values, fp32: what columns are now.
        factor: F `[groups, columns, columns]` fp32; only what lies above the diagonal is read.
        scale: shape of values, fp32, of any sign; with 0, q is 0.
        zero: shape of values, fp32; None for 0.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        `[columns, groups, n]` fp32.

    Raises:
        ValueError, TypeError: if a tensor is not as above, or qmin >= qmax.

    Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1, inner loop.
    """
    if not isinstance(values, Tensor) or values.dim() != 3 or not 1 <= len(values) <= COLUMNS_MAX:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{WHO}: values must be [columns, groups, n] with 1 to {COLUMNS_MAX} columns, got {got}")
    columns, groups, _ = shape = tuple(values.shape)
    named = {"values": values, "start": start, "scale": scale, **({} if zero is None else {"zero": zero})}
    for name, t in named.items():
        check_tensor(WHO, name, t, (torch.float32,), shape)
    check_tensor(WHO, "factor", factor, (torch.float32,), (groups, columns, columns))
    for name, t in {**named, "factor": factor}.items():
        if t.device != values.device:
            raise ValueError(f"{WHO}: {name} must be on the device of values, {values.device}, got {t.device}; move it")
    check_grid(WHO, qmin, qmax)
    tensors = (None if t is None else t.detach().contiguous() for t in (values, start, factor, scale, zero))
    return _run(*tensors, qmin, qmax)  # type: ignore[no-any-return]
