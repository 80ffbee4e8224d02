"""Multiplies matrices of fp32 on the CPU by oneDNN, which uses AVX-512 on CPUs of every maker.

The BLAS of PyTorch is that of one maker, and takes twice as long on CPUs of another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gs_kernels.runtime.instructions import has
from gs_kernels.runtime.torch_private import autocasts, is_plain_call, linear_of_onednn

LEAST = 1 << 21  # products, from which oneDNN pays: a call costs it some microseconds more


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x weight^T + bias`, as `torch.nn.functional.linear` does; sums may be of another order.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`.
    """
    return _by_onednn(x, weight, bias) if onednn_takes(x, weight, bias) else F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Computes `left @ right` of `[M, K]` and `[K, N]`, or of `[groups, M, K]` and `[groups, K, N]`."""
    if left.dim() == right.dim() == 3 and len(left) == len(right) == 1:
        return matmul(left[0], right[0]).unsqueeze(0)
    return _by_onednn(left, right.t()) if right.dim() == 2 and onednn_takes(left, right.t()) else left @ right


def add_matmul_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` of `[M, K]` and `[K, N]` to total `[M, N]`, in place."""
    if onednn_takes(left, right.t()):
        total += _by_onednn(left, right.t())
    else:
        total.addmm_(left, right)


def onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Says whether oneDNN multiplies: large fp32 matrices, without gradients, on a CPU with AVX-512."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        linear_of_onednn is not None
        and all(is_plain_call(t) and t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and x.numel() * len(weight) >= LEAST
        and has("avx512_f")
        and torch.backends.mkldnn.is_available()
        and not autocasts()
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert linear_of_onednn is not None
    # rows with gaps between them make it take a thousand times as long
    dense = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
    return linear_of_onednn(x, dense, bias, "none", [], "")
