"""Describes the grids of SLB, as data and as text (`int2@channel` or `2bit@channel`, `1bit`), and the start on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gs_algos.quant.scheme import Scheme, nearest
from gs_kernels import PerGroup, PerTensor
from gs_kernels.pack.layouts import BITS

GRAMMAR = "int<1|2|4|8>@<tensor|channel>[:lsq] or <1|2|4|8>bit[@tensor|@channel][:learned]"
SHARED = ("none", "tensor", "channel")
RATIOS = 64  # scales tried, as shares of the largest weight, from 1 down to SMALLEST_RATIO
SMALLEST_RATIO = 0.15


@dataclass(frozen=True)
class LevelGrid:
    """Describes `2**bits` evenly spaced levels from -1 to 1, times a scale: of 2 bits -1, -1/3, 1/3 and 1.

    Args:
        per: what shares one scale: "none" (there is no scale: a batch norm absorbs it), "tensor" or "channel".
        learned: the scale is a parameter.

    `str(grid)` is the text form, which `LevelGrid.parse` reads back.

    Raises:
        ValueError: if there are no such grids.
    """

    bits: int
    per: str = "none"
    learned: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"LevelGrid: bits must be one of {', '.join(map(str, BITS))}, got {self.bits!r}")
        if self.per not in SHARED:
            raise ValueError(f"LevelGrid: per must be one of {', '.join(SHARED)}, got {self.per!r}")
        if self.learned and self.per == "none":
            raise ValueError("LevelGrid: a learned scale needs per='tensor' or 'channel', got per='none'")

    @staticmethod
    def parse(text: str | LevelGrid | Scheme) -> LevelGrid:
        """Reads the text form, or that of a `Scheme`: `int2@channel` is `2bit@channel`, `:lsq` is `:learned`.

        The scale always starts at the least squared error, so that `minmax` and `mse` mean the same here.

        Raises:
            ValueError: if the text follows neither grammar, or asks for a grid whose levels do not lie evenly around 0.
        """
        if isinstance(text, LevelGrid):
            return text
        if isinstance(text, Scheme) or (isinstance(text, str) and re.match(r"u?int\d|mxfp|nvfp", text)):
            return _of_scheme(text)
        match = re.fullmatch(r"(\d+)bit(?:@(tensor|channel))?(:learned)?", text) if isinstance(text, str) else None
        if match is None or int(match[1]) not in BITS:
            raise ValueError(f"SLB: weight must look like {GRAMMAR}, got {text!r}{_near(text)}")
        if match[3] and not match[2]:
            raise ValueError(f"SLB: a learned scale needs @tensor or @channel, got {text!r}")
        return LevelGrid(int(match[1]), match[2] or "none", bool(match[3]))

    def __str__(self) -> str:
        where = "" if self.per == "none" else f"@{self.per}"
        return f"{self.bits}bit{where}{':learned' if self.learned else ''}"

    @property
    def n_levels(self) -> int:
        return int(2**self.bits)

    @property
    def planes(self) -> int:
        """Counts the logits of each weight: of two levels only the difference matters, so one is enough."""
        return 1 if self.bits == 1 else self.n_levels

    @property
    def step(self) -> float:
        """Returns the distance of two levels."""
        return 2 / (self.n_levels - 1)

    @property
    def zero(self) -> float:
        """Returns the code, with a fraction, that stands for 0: level i is `(i - zero) * step`."""
        return (self.n_levels - 1) / 2

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the levels, `[L]` fp32."""
        codes = torch.arange(self.n_levels, dtype=torch.float64, device="cpu")
        return ((codes - self.zero) * self.step).float().to(device)

    def n_scales(self, channels: int) -> int:
        return {"none": 0, "tensor": 1, "channel": channels}[self.per]


def _of_scheme(text: str | Scheme) -> LevelGrid:
    try:
        scheme = Scheme.parse(text, "weight")
    except ValueError as error:
        raise ValueError(f"SLB: {str(error).removeprefix('Scheme: ')}") from None
    if scheme.is_float:
        raise ValueError(
            f"SLB: weight must have levels that lie evenly around 0, got {str(text)!r}; use 'int4@channel'"
        )
    bits = min((width for width in BITS if width >= scheme.bits), default=max(BITS))
    per = "tensor" if isinstance(scheme.granularity, PerTensor) else "channel"
    grid = LevelGrid(bits, per, scheme.learned)
    for what, right in (
        (f"{', '.join(map(str, BITS))} bits", bits == scheme.bits),
        ("a scale per tensor or channel", not isinstance(scheme.granularity, PerGroup)),
        ("levels that lie evenly around 0", scheme.symmetric and scheme.format.signed),
        (f"all {2**bits} levels", not scheme.format.narrow),
        ("the scale of least error", scheme.observer in ("minmax", "mse")),
    ):
        if not right:
            given = str(text)
            use = f"int{bits}@{per}{':lsq' if scheme.learned else ''}"
            raise ValueError(f"SLB: weight must have {what}, got {given!r}; use {use!r}")
    return grid


def _near(text: Any) -> str:
    """Returns `; use ...` with the grid that was meant, in the words of the author; "" if that is not clear."""
    if type(text) is int and text in BITS:
        return f"; use '{text}bit@channel'"
    guess = nearest(text, "weight") if isinstance(text, str) else ""
    if not guess.startswith("'"):  # nothing, or options to be given
        return guess and f"; use {guess}"
    try:
        grid = _of_scheme(guess.strip("'"))
    except ValueError as error:
        return str(error)[str(error).index("; use") :]
    return f"; use '{grid}'" if "bit" in text else f"; use {guess}"


@torch.no_grad()
def fitted_scale(rows: Tensor, grid: LevelGrid) -> Tensor:
    """Finds the scale c of least squared error of `c * nearest level of (w / c)`, `[C]` fp32, from `rows [C, n]`.

    Rows of zeros get 1. One bit: mean |w|, the exact solution; else the best of RATIOS shares of max |w|.
    """
    size = rows.float().abs()
    largest = size.amax(1)
    if grid.bits == 1:
        best = size.mean(1)
    else:
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        for ratio in torch.linspace(1.0, SMALLEST_RATIO, RATIOS, dtype=torch.float32, device="cpu").tolist():
            c = (ratio * largest)[:, None]
            near = nearest_codes(size / c.clamp(min=torch.finfo(torch.float32).tiny), grid)
            error = ((near - grid.zero) * grid.step * c - size).square().sum(1)
            best = torch.where(error < least, c[:, 0], best)
            least = torch.minimum(error, least)
    return torch.where(best > 0, best, 1.0)


def nearest_codes(u: Tensor, grid: LevelGrid) -> Tensor:
    """Returns the code, in floating point, of the level nearest to u; u is in units of the scale."""
    return (u / grid.step + grid.zero).round().clamp(0, grid.n_levels - 1)


def default_sharpness(grid: LevelGrid) -> float:
    """Returns the kappa to start at: a Gaussian of half a step around the weight, `2 / step**2`."""
    return 2 / grid.step**2


@torch.no_grad()
def logits_near(rows: Tensor, scale: Tensor, grid: LevelGrid, kappa: float) -> Tensor:
    """Computes `A_k = -kappa * (w / c - v_k)**2`, `[O, planes, R]` fp32, for `rows [O, R]` and `scale [O]` or `[1]`.

    One bit: the difference of the two, `4 * kappa * w / c`.
    """
    u = rows.float() / scale.view(-1, 1)
    if grid.planes == 1:
        return (4 * kappa * u)[:, None]
    levels = grid.levels(rows.device).view(1, -1, 1)
    return -kappa * (u[:, None] - levels).square()


def random_logits(shape: tuple[int, int], grid: LevelGrid, generator: Any = None) -> Tensor:
    """Draws standard normal logits, `[O, planes, R]` fp32: the start of the paper. One bit: the difference of two."""
    o, r = shape
    a = torch.randn(o, grid.planes, r, generator=generator, dtype=torch.float32, device="cpu")
    return a * 2**0.5 if grid.planes == 1 else a
