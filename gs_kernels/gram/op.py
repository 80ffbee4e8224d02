"""Summing products of columns: implementations, registration, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.gram.cpu import gram__cpu
from gs_kernels.gram.ref import gram_ref
from gs_kernels.pack.checks import FLOATS, check_tensor
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager

WHO = "gram_"


def _gram_ref(total: Tensor, x: Tensor, floats: Tensor | None) -> None:
    total.copy_(gram_ref(total, x, floats))


def _nothing(*_: object) -> None:
    return None


GRAM = implementations("gram_", _gram_ref, gram__cpu)
_gram = register("gram_(Tensor(a!) total, Tensor x, Tensor? floats) -> ()", GRAM, _nothing)


def gram_(total: Tensor, x: Tensor, floats: Tensor | None = None) -> None:
    """Adds `x^T x` to total, in place; with floats `(floats - x)^T x`. No gradient.

    Products are exact and sums are fp32, never TF32. The difference is taken in fp32 and rounded to the dtype of x; of
    numbers within a factor of two of each other it is exact. Without floats, total must be symmetric: what lies below
    its diagonal is not read, and half of the products are left out. On a CPU, x of 16 bits is copied to fp32.

    Args:
        total: `[K, K]` fp32, contiguous, or `[groups, K, K]`, of inputs that have sums of their own.
        x: `[T, K]` or `[groups, T, K]`, fp32 / fp16 / bf16, any strides: T tokens.
        floats: shape of x, fp32 / fp16 / bf16, any strides: the same tokens in another network.

    Raises:
        ValueError, TypeError: if a tensor is not as above, or not on the device of total.
    """
    with torch.no_grad():
        _gram(*_checked(total, x, floats))
    if is_eager(total):
        torch.autograd.graph.increment_version((total,))


def _checked(total: Tensor, x: Tensor, floats: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns total, x and floats as `[groups, ., K]`."""
    if not isinstance(total, Tensor) or total.dtype != torch.float32:
        raise TypeError(f"{WHO}: total must be a float32 tensor, got {getattr(total, 'dtype', type(total).__name__)}")
    if total.dim() not in (2, 3) or total.shape[-1] != total.shape[-2] or not total.is_contiguous():
        got = f"{list(total.shape)} with strides {list(total.stride())}"
        raise ValueError(f"{WHO}: total must be a contiguous [K, K] or [groups, K, K], got {got}")
    tokens = x.shape[-2] if isinstance(x, Tensor) and x.dim() > 1 else 0
    shape = (*total.shape[:-2], tokens, total.shape[-1])
    check_tensor(WHO, "x", x, FLOATS, shape)
    if floats is not None:
        check_tensor(WHO, "floats", floats, FLOATS, shape)
    for name, t in {"x": x, "floats": floats}.items():
        if t is not None and t.device != total.device:
            raise ValueError(f"{WHO}: {name} must be on the device of total, {total.device}, got {t.device}; move it")
    if total.dim() == 3:
        return total, x, floats
    return total.unsqueeze(0), x.unsqueeze(0), None if floats is None else floats.unsqueeze(0)
