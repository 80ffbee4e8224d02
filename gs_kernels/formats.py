"""Describes quantized values: how many bits each has, and which elements share one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

E2M1 = tuple(sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))  # by code
E2M1_MAX = 6.0


@dataclass(frozen=True)
class IntFormat:
    """Describes an integer grid: `IntFormat(4, signed=True)` holds -8..7, with `narrow=True` -7..7."""

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"IntFormat: bits must be in 1..8, got {self.bits}")
        if self.narrow and self.bits == 1:
            raise ValueError("IntFormat: a narrow range needs bits >= 2, got bits=1; use narrow=False")

    @property
    def qmin(self) -> int:
        return (-(1 << (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True)
class FloatFormat:
    """Describes a grid of 4-bit floats, e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 of either sign, in groups with 8-bit scales.

    `mxfp4`: groups of 32, whose scales are powers of two (e8m0). `nvfp4`: groups of 16, whose scales are floats (e4m3),
    divided by one number of the whole tensor.

    Source: OCP Microscaling Formats 1.0, section 5; NVIDIA, Pretraining LLMs with NVFP4, arXiv:2509.25149, section 2.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in FLOAT_GROUPS:
            raise ValueError(f"FloatFormat: name must be {' or '.join(FLOAT_GROUPS)}, got {self.name!r}")

    @property
    def bits(self) -> int:
        return 4

    @property
    def signed(self) -> bool:
        return True

    @property
    def narrow(self) -> bool:
        return False

    @property
    def group_size(self) -> int:
        return FLOAT_GROUPS[self.name]

    @property
    def divided(self) -> bool:
        """Says whether scales are divided by one number of the tensor."""
        return self.name == "nvfp4"


FLOAT_GROUPS = {"mxfp4": 32, "nvfp4": 16}  # name -> elements that share a scale


@dataclass(frozen=True)
class PerTensor:
    """Gives the whole tensor one scale: scale has shape `[1]`."""


@dataclass(frozen=True)
class PerChannel:
    """Gives each slice along `axis` a scale: scale has shape `[x.shape[axis]]`."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """Gives `size` consecutive elements of the last axis a scale: `[x.numel() // size]`, row-major.

    A row is everything under one index of the first axis, flattened: K of a linear weight `[N, K]`, `C*R*S` of a conv
    weight `[O, C, R, S]`. `size` must divide it, so that no group holds elements of two rows.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PerGroup: size must be >= 1, got {self.size}")


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup

PER_TENSOR = PerTensor()


def granularity_of(axis: int, group: int) -> Granularity:
    """Returns the granularity that an op's schema carries as two numbers: axis (-1: none) and group size (0: none)."""
    if group > 0:
        return PerGroup(int(group))
    return PerChannel(int(axis)) if axis >= 0 else PerTensor()
