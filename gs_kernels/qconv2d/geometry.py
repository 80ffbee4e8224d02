"""Describes a convolution: filter, stride, padding, dilation and groups, checked, and as an op schema carries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from gs_kernels.runtime.torch_op import Carried

Pair: TypeAlias = int | tuple[int, int]
Padding: TypeAlias = int | tuple[int, int] | str
# convolves images of one shape; takes the image and, if there is a residual, it and, of codes, their scale and zero
# point; returns `[B, O, P, Q]`, channels-last
ConvolvesImages: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class ConvGeometry:
    """Holds the filter `[R, S]`, strides, padding at each side, dilation (of H, then of W), and groups of channels."""

    r: int
    s: int
    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @property
    def taps(self) -> int:
        return self.r * self.s

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Returns the padding as `torch.nn.functional.pad` takes it."""
        return self.left, self.right, self.top, self.bottom

    @property
    def is_symmetric(self) -> bool:
        return self.top == self.bottom and self.left == self.right

    @property
    def is_pointwise(self) -> bool:
        """Says whether y is a product of the pixels of x as they are."""
        return self.taps == 1 and self.stride == (1, 1) and not any(self.sides)

    def reach(self, x: Tensor) -> int:
        """Computes how many elements of x `[B, C, H, W]` lie between the first and the last that a pixel of y sees."""
        c, h, w = (abs(x.stride(axis)) for axis in (1, 2, 3))
        taps = (self.r - 1) * self.dilation_h * h + (self.s - 1) * self.dilation_w * w
        return taps + (x.shape[1] // self.groups - 1) * c

    def output(self, h: int, w: int) -> tuple[int, int]:
        """Computes P and Q of y from H and W of x."""
        p = h + self.top + self.bottom - self.dilation_h * (self.r - 1) - 1
        q = w + self.left + self.right - self.dilation_w * (self.s - 1) - 1
        return p // self.stride_h + 1, q // self.stride_w + 1


def _flatten(geometry: ConvGeometry) -> tuple[list[int]]:
    return ([getattr(geometry, f.name) for f in fields(geometry)],)


# "window" stays: files of torch.export name the arguments of ops
GEOMETRY = Carried(ConvGeometry, "int[] window", _flatten, lambda numbers: ConvGeometry(*numbers))


def make_geometry(
    who: str, kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> ConvGeometry:
    """Checks arguments as `torch.nn.Conv2d` takes them and returns their geometry.

    Raises:
        TypeError, ValueError: if one is no integer or pair of integers, or too small, or a padding is not supported.
    """
    if torch.compiler.is_compiling():
        return _make_geometry(who, kernel_size, stride, padding, dilation, groups)
    try:
        return _known_geometry(who, kernel_size, stride, padding, dilation, groups)
    except TypeError:  # lists cannot be looked up, and what is wrong is told once more
        return _make_geometry(who, kernel_size, stride, padding, dilation, groups)


def _make_geometry(
    who: str, kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> ConvGeometry:
    r, s = _pair(who, "kernel_size", kernel_size, 1)
    stride_h, stride_w = _pair(who, "stride", stride, 1)
    dilation_h, dilation_w = _pair(who, "dilation", dilation, 1)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{who}: groups must be an integer >= 1, got {groups!r}")
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(
                f"{who}: padding must be an integer, a pair or 'same', got {padding!r};"
                " pad x beforehand with torch.nn.functional.pad for other modes"
            )
        if (stride_h, stride_w) != (1, 1):
            raise ValueError(f"{who}: padding 'same' needs stride 1, got {(stride_h, stride_w)}; give numbers")
        height, width = dilation_h * (r - 1), dilation_w * (s - 1)
        top, left = height // 2, width // 2
        bottom, right = height - top, width - left
    else:
        top, left = _pair(who, "padding", padding, 0)
        bottom, right = top, left
    return ConvGeometry(r, s, stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w, groups)


_known_geometry = lru_cache(maxsize=1024, typed=True)(_make_geometry)  # making one takes 4 us


def _pair(who: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise TypeError(f"{who}: {name} must be an integer or a pair (height, width), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{who}: {name} must be at least {least}, got {value!r}")
    return pair[0], pair[1]
