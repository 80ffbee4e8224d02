"""Checks the arguments of the ops of SLB: metadata only, but for `check_values`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_tensor, dtype_name
from gs_kernels.slb.memory_format import CHANNELS_LAST
from gs_kernels.slb.ref import TAU_MIN

LEVELS_MAX = 256


def check_logits(who: str, logits: Tensor) -> int:
    """Checks the logits; returns the number of levels that they choose among."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{who}: logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise TypeError(f"{who}: logits must be one of {names}, got {dtype_name(logits.dtype)}; cast them first")
    if logits.dim() < 3 or logits.numel() == 0:
        raise ValueError(
            f"{who}: logits must be [O, L, ...] with three axes or more and no axis of 0, got {list(logits.shape)}"
        )
    planes = logits.shape[1]
    if planes > LEVELS_MAX:
        raise ValueError(f"{who}: logits must have at most {LEVELS_MAX} levels along axis 1, got {planes}")
    return max(2, planes)


def check_levels(who: str, logits: Tensor, levels: Tensor, temperature: Tensor, scale: Tensor | None) -> None:
    count = check_logits(who, logits)
    named = {"levels": (levels, count), "temperature": (temperature, 1)}
    if scale is not None:
        named["scale"] = (scale, logits.shape[0])
    for name, (t, size) in named.items():
        check_fp32(who, name, t, (size,), logits)


def check_fp32(who: str, name: str, t: Tensor, shape: tuple[int, ...], logits: Tensor) -> None:
    """Checks that t is fp32 of that shape, on the device of the logits."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(t).__name__}; use torch.tensor([...])")
    if t.dtype != torch.float32:
        raise TypeError(f"{who}: {name} must be float32, got {dtype_name(t.dtype)}; use {name}.float()")
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{who}: {name} must have shape {list(shape)} for logits {list(logits.shape)}, got {list(t.shape)}"
        )
    check_device(who, name, t, logits)


def check_device(who: str, name: str, t: Tensor, logits: Tensor) -> None:
    if t.device != logits.device:
        raise ValueError(
            f"{who}: {name} must be on the device of the logits, {logits.device}, got {t.device};"
            f" use {name}.to(logits.device)"
        )


def check_values(who: str, levels: Tensor, temperature: Tensor) -> None:
    """Raises if a level or the temperature cannot be used. Reads them: only for CPU tensors in eager mode."""
    tau = temperature.item()
    if not TAU_MIN <= tau < math.inf:
        raise ValueError(f"{who}: temperature must be > 0 (at least 2**-100) and finite, got {tau:.6g}")
    values = levels.tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{who}: every level must be finite, got {values}")


def check_weight(
    who: str,
    logits: Tensor,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> tuple[list[int], torch.dtype, bool]:
    """Checks that the logits make such a weight; returns its shape, dtype and whether channels come last."""
    o, count = logits.shape[0], math.prod(logits.shape[2:])
    size = [o, *logits.shape[2:]] if shape is None else list(shape)
    if len(size) < 2 or size[0] != o or math.prod(size[1:]) != count:
        raise ValueError(
            f"{who}: shape must be [{o}, ...] with {count} weights for each of them, as the logits"
            f" {list(logits.shape)} have, got {size}"
        )
    dtype = logits.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{who}: dtype must be one of {', '.join(map(dtype_name, FLOATS))}, got {dtype_name(dtype)}")
    if memory_format == torch.contiguous_format:
        return size, dtype, False
    if memory_format != CHANNELS_LAST.get(len(size)):
        raise ValueError(
            f"{who}: memory_format must be torch.contiguous_format, torch.channels_last for a weight of 4 axes or"
            f" torch.channels_last_3d for 5, got {memory_format} for {len(size)} axes"
        )
    return size, dtype, True


def check_update(who: str, logits: Tensor, dw: Tensor, state: dict[str, Tensor | None], frozen: Tensor | None) -> None:
    """Checks that what an optimizer step writes is contiguous, and that dw is the gradient of these logits' weight."""
    if not logits.is_contiguous():
        raise ValueError(f"{who}: logits must be contiguous, got strides {list(logits.stride())}; store them so")
    if not isinstance(dw, Tensor):
        raise TypeError(f"{who}: dw must be a tensor, got {type(dw).__name__}")
    if dw.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise TypeError(f"{who}: dw must be one of {names}, got {dtype_name(dw.dtype)}")
    if dw.dim() < 2 or dw.shape[0] != logits.shape[0] or dw.numel() != logits.numel() // logits.shape[1]:
        raise ValueError(
            f"{who}: dw must be the gradient of the weight, one number for each, not of its logits"
            f" {list(logits.shape)}, got {list(dw.shape)}"
        )
    check_device(who, "dw", dw, logits)
    for name, t in state.items():
        if t is None:
            continue
        check_tensor(who, name, t, FLOATS, tuple(logits.shape))
        check_device(who, name, t, logits)
        if not t.is_contiguous():
            raise ValueError(f"{who}: {name} must be contiguous, got strides {list(t.stride())}")
    if frozen is not None:
        check_tensor(who, "frozen", frozen, (torch.bool,), (1,))
        check_device(who, "frozen", frozen, logits)


def check_rates(who: str, lr: float | Tensor, logits: Tensor, **rates: float) -> None:
    """Checks that lr is a number or fp32 `[1]`, and each of `rates` a number in the range that its name has."""
    if isinstance(lr, Tensor):
        check_fp32(who, "lr", lr, (1,), logits)
    else:
        rates = {"lr": lr, **rates}
    for name, value in rates.items():
        below_one = name.startswith(("beta", "momentum"))
        if not (0 <= value < (1 if below_one else math.inf)):
            raise ValueError(f"{who}: {name} must be in [0, {'1' if below_one else 'inf'}), got {value}")
