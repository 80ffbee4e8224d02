"""Calls other providers of convolutions, for the benchmark: each takes the arguments of `qconv2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qconv2d.dense import convolve_dense
from gs_kernels.qconv2d.geometry import make_geometry

_kept: Any = WeakIdKeyDictionary()


def float_conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    **window: Any,
) -> Tensor:
    """Calls the float layer that a packed one replaces, its weight dequantized beforehand: cuDNN's on an NVIDIA GPU."""
    if weight.codes not in _kept or _kept[weight.codes].dtype != x.dtype:
        _kept[weight.codes] = dequantize_packed(weight, x.dtype)
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | window
    return convolve_dense(x, _kept[weight.codes], bias, residual, make_geometry("float_conv2d", **options), activation)
