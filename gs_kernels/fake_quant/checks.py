"""Checks the arguments of the fake-quant ops: metadata only, but for `check_values`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import SCALE_MAX, SCALE_MIN, ZERO_MAX
from gs_kernels.formats import Granularity, PerChannel, PerGroup, PerTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEVEL_MAX = 1 << 16


def check_input(who: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{who}: x must be one of {names}, got {str(x.dtype).removeprefix('torch.')}; cast x first")
    if x.numel() == 0:
        raise ValueError(f"{who}: x must hold at least one element, got shape {tuple(x.shape)}")


def check_granularity(who: str, x: Tensor, granularity: Granularity) -> tuple[int, int, int]:
    """Checks that x has the granularity; returns axis (-1: none), group size (0: none) and the number of scales."""
    if isinstance(granularity, PerTensor):
        return -1, 0, 1
    if isinstance(granularity, PerChannel):
        axis, ndim = granularity.axis, x.dim()
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{who}: axis must be in [{-ndim}, {ndim}) for x of shape {tuple(x.shape)}, got axis={axis}"
            )
        axis %= ndim
        return axis, 0, x.shape[axis]
    if isinstance(granularity, PerGroup):
        size, row = granularity.size, x.numel() // x.shape[0] if x.dim() > 1 else x.numel()
        if row % size != 0:
            raise ValueError(
                f"{who}: group size must divide the {row} elements of a row of x {tuple(x.shape)}, got size={size};"
                f" use PerGroup({math.gcd(int(row), size)})"
            )
        return -1, size, x.numel() // size
    raise TypeError(f"{who}: granularity must be PerTensor, PerChannel or PerGroup, got {granularity!r}")


def check_grid(who: str, qmin: int, qmax: int) -> None:
    if qmin >= qmax:
        raise ValueError(f"{who}: qmin must be below qmax, got qmin={qmin}, qmax={qmax}")
    if qmin < -LEVEL_MAX or qmax > LEVEL_MAX:
        raise ValueError(f"{who}: levels must be within ±{LEVEL_MAX}, got qmin={qmin}, qmax={qmax}")


def check_codes(who: str, qmin: int, qmax: int) -> None:
    check_grid(who, qmin, qmax)
    low, high, name = (-128, 127, "int8") if qmin < 0 else (0, 255, "uint8")
    if qmin < low or qmax > high:
        raise ValueError(f"{who}: levels must fit {name}, {low}..{high}, got qmin={qmin}, qmax={qmax}")


def check_qparams(who: str, x: Tensor, scale: Tensor, zero: Tensor, channels: int) -> None:
    for name, t in (("scale", scale), ("zero", zero)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{who}: {name} must be a tensor, got {type(t).__name__}; use torch.tensor([...])")
        if t.dtype != torch.float32:
            raise TypeError(
                f"{who}: {name} must be float32, got {str(t.dtype).removeprefix('torch.')}; use {name}.float()"
            )
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(
                f"{who}: {name} must have shape [{channels}] for x of shape {tuple(x.shape)}, got {list(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(
                f"{who}: {name} must be on the device of x, {x.device}, got {t.device}; use {name}.to(x.device)"
            )


def check_values(who: str, scale: Tensor, zero: Tensor) -> None:
    """Raises if a scale or a zero point cannot be used. Reads the values: only for CPU tensors in eager mode."""
    low, high = (t.item() for t in torch.aminmax(scale.detach()))
    if not (low >= SCALE_MIN and high <= SCALE_MAX):
        raise ValueError(f"{who}: every scale must be > 0 (at least 2**-126) and finite, got {low:.6g} to {high:.6g}")
    low, high = (t.item() for t in torch.aminmax(zero.detach()))
    if not (low >= -ZERO_MAX and high <= ZERO_MAX):
        raise ValueError(f"{who}: every zero point must be finite and within ±2**20, got {low:.6g} to {high:.6g}")
