"""Says how images are laid out so that pixels which a tap of a filter meets lie side by side, an axis at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Axis(NamedTuple):
    """Says how one axis of an image is laid out for a product.

    phases: of the pixels that are side by side. taps: for each tap its place among them, and how far on it starts.
    pixels: of a phase. before: zeros in front of the image.
    """

    phases: tuple[int, ...]
    taps: tuple[tuple[int, int], ...]
    pixels: int
    before: int


@lru_cache(maxsize=1024)
def forward_axis(taps: int, stride: int, dilation: int, before: int, outputs: int) -> Axis:
    """Lays out an axis so that `outputs` pixels meet each tap side by side."""
    places = [divmod(tap * dilation, stride) for tap in range(taps)]
    phases = tuple(sorted({phase for _, phase in places}))
    count = outputs + max(start for start, _ in places)
    return Axis(phases, tuple((phases.index(phase), start) for start, phase in places), count, before)


class GradientPhase(NamedTuple):
    """Holds the pixels of x of one phase: how many there are, which taps meet them, and where those start in dy."""

    phase: int
    pixels: int
    taps: tuple[int, ...]
    starts: tuple[int, ...]


@lru_cache(maxsize=1024)
def gradient_axis(
    taps: int, stride: int, dilation: int, before: int, inputs: int
) -> tuple[tuple[GradientPhase, ...], int, int]:
    """Lays out an axis of dy so that pixels of x meet it side by side.

    Returns:
        the phases of x; the pixels of dy that are laid out; how many zeros come before the image.
    """
    phases = []
    for phase in range(min(stride, inputs)):
        places = [(tap, divmod(phase + before - tap * dilation, stride)) for tap in range(taps)]
        mine = [(tap, start) for tap, (start, left) in places if left == 0]
        count = (inputs - phase - 1) // stride + 1
        phases.append(GradientPhase(phase, count, tuple(t for t, _ in mine), tuple(start for _, start in mine)))
    starts = [start for phase in phases for start in phase.starts] or [0]
    first = min(starts)
    shifted = tuple(p._replace(starts=tuple(start - first for start in p.starts)) for p in phases)
    return shifted, max(p.pixels for p in phases) + max(starts) - first, -first
