"""Multiplies rows, sorted by expert, with packed weights of experts: implementations, registration, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_packed, check_tensor, dtype_name
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qmatmul.op import planar_refuses
from gs_kernels.qmatmul_grouped.cpu import qmatmul_grouped_cpu
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register, save, saved

WHO = "qmatmul_grouped"


def _by_expert(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies rows x `[M, K]` with w `[E, K, N]`, each with that of its expert; 0 behind the last offset.

    Of every expert all rows, so that no shape depends on values: what a compiler sees without a GPU.
    """
    expert = torch.searchsorted(offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True)
    y = x.new_zeros(x.shape[0], w.shape[2])
    for e in range(w.shape[0]):
        y = torch.where((expert == e).unsqueeze(1), x @ w[e], y)
    return y


def _of_experts(weight: PackedWeight, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_packed(weight, dtype).view(offsets.shape[0], -1, weight.shape[1])  # [E, N, K]


def _qmatmul_grouped_ref(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None) -> Tensor:
    y = _by_expert(x, _of_experts(weight, offsets, x.dtype).transpose(1, 2), offsets)
    return y if bias is None else (y.float() + _bias_rows(bias, offsets, x.shape[0])).to(x.dtype)


def _bias_rows(bias: Tensor, offsets: Tensor, m: int) -> Tensor:
    """Returns the bias of each row's expert, fp32 `[M, N]`; 0 behind the last offset."""
    expert = torch.searchsorted(offsets, torch.arange(m, device=bias.device, dtype=offsets.dtype), right=True)
    rows = torch.nn.functional.pad(bias.float().view(offsets.shape[0], -1), (0, 0, 0, 1))
    return rows[expert]


def _dx_ref(dy: Tensor, weight: PackedWeight, offsets: Tensor) -> Tensor:
    return _by_expert(dy, _of_experts(weight, offsets, dy.dtype), offsets)


def _no_kernel(*_: object) -> list[str]:
    return ["has no kernel of its own: the weight is dequantized"]


QMATMUL_GROUPED = implementations("qmatmul_grouped", _qmatmul_grouped_ref, qmatmul_grouped_cpu, planar_refuses)
DX = implementations("qmatmul_grouped_dx", _dx_ref, refuses=_no_kernel)


def _fake(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // offsets.shape[0])


def _dx_fake(dy: Tensor, weight: PackedWeight, offsets: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, weight=inputs.weight, offsets=inputs.offsets, bias=inputs.bias)


def _gradient(ctx: Any, wanted: set[str], dy: Tensor) -> dict[str, Tensor | None]:
    weight, offsets, bias = saved(ctx)
    grads: dict[str, Tensor | None] = {"x": _run_dx(dy, weight, offsets) if "x" in wanted else None}
    if "bias" in wanted:
        m, experts = dy.shape[0], offsets.shape[0]
        expert = torch.searchsorted(offsets, torch.arange(m, device=dy.device, dtype=offsets.dtype), right=True)
        sums = dy.new_zeros(experts + 1, dy.shape[1], dtype=torch.float32).index_add(0, expert, dy.float())
        grads["bias"] = sums[:experts].reshape(-1).to(bias.dtype)
    return grads


def _dx_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, weight=inputs.weight, offsets=inputs.offsets)


def _dx_gradient(ctx: Any, wanted: set[str], ddx: Tensor) -> dict[str, Tensor | None]:
    weight, offsets = saved(ctx)
    return {"dy": _run(ddx, weight, offsets, None)}


_run = register(
    "qmatmul_grouped(Tensor x, PackedWeight weight, Tensor offsets, Tensor? bias) -> Tensor",
    QMATMUL_GROUPED,
    _fake,
    _gradient,
    _setup_context,
    carried=(PACKED_WEIGHT,),
)
_run_dx = register(
    "qmatmul_grouped_dx(Tensor dy, PackedWeight weight, Tensor offsets) -> Tensor",
    DX,
    _dx_fake,
    _dx_gradient,
    _dx_setup_context,
    carried=(PACKED_WEIGHT,),
)


def qmatmul_grouped(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x_e @ W_e^T + bias_e` for the rows x_e of each expert e, which lie behind one another: one launch for all.

    Arithmetic is that of `qmatmul`. A GPU splits the work by tiles of rows, not by experts: one with all rows and one
    with none cost what their rows do. Gradients: dx, which dequantizes every expert, and dbias; none to the weight.

    Args:
        x: `[M, K]` fp32 / fp16 / bf16, sorted by expert.
        weight: `[E * N, K]`, the N rows of expert 0, then those of expert 1, ... On a GPU planar, as of `qmatmul`.
        offsets: `[E]` int32 / int64, not falling: rows `offsets[e - 1]` up to `offsets[e]` go to expert e, from 0 on.
            A GPU's values are not checked, which would wait for it. Rows behind the last give 0.
        bias: `[E * N]` fp32 / fp16 / bf16.

    Returns:
        `[M, N]`, dtype of x, contiguous.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or offsets fall or leave x (CPU).
    """
    if (y := _run.repeat(x, weight, offsets, bias)) is not None:
        return y  # type: ignore[no-any-return]
    _check(x, weight, offsets, bias)
    return _run(x, weight, offsets, bias)  # type: ignore[no-any-return]


def _check(x: Tensor, weight: PackedWeight, offsets: Tensor, bias: Tensor | None) -> None:
    for name, t, dtypes in (("x", x, FLOATS), ("offsets", offsets, (torch.int32, torch.int64))):
        if not isinstance(t, Tensor) or t.dtype not in dtypes:
            got = dtype_name(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{WHO}: {name} must be {' / '.join(map(dtype_name, dtypes))}, got {got}")
    check_packed(WHO, weight)
    rows, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"{WHO}: x must be [M, K] with K={k} of the weight, got {list(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or rows % offsets.shape[0] != 0:
        raise ValueError(
            f"{WHO}: offsets must be [E], E a divisor of the {rows} rows of the weight, got {list(offsets.shape)}"
        )
    if bias is not None:
        check_tensor(WHO, "bias", bias, FLOATS, (rows,))
    for name, other in (("weight", weight.codes), ("offsets", offsets), ("bias", bias)):
        if other is not None and other.device != x.device:
            must = f"{name} must be on the device of x, {x.device}"
            raise ValueError(f"{WHO}: {must}, got {other.device}; move it there")
