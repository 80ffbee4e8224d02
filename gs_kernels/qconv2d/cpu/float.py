"""Convolves float images with a packed weight on the CPU: dequantizes its filters, then calls ATen, channels-last.

A weight is small against what an image takes to convolve with it: to dequantize it adds a tenth of the time at 8 images
of 56 x 56, and as much again at one of 7 x 7 with 512 channels. So a caller decides whether they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qconv2d.dense import convolve_dense
from gs_kernels.qconv2d.geometry import ConvGeometry, ConvolvesImages
from gs_kernels.qmatmul.cpu.float import computed_in, without_autocast


class FloatConvolution:
    """Prepares `qconv2d` on a CPU: everything but image and residual is fixed, and the weight is kept dequantized.

    Args:
        dtype: of images.

    Raises:
        UnsuitableError: if the weight cannot be kept.
    """

    def __init__(
        self, weight: PackedWeight, geometry: ConvGeometry, bias: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        computed = computed_in(dtype)
        self.weight = derived(weight, computed, lambda weight: dequantize_packed(weight, computed))
        self.bias, self.geometry, self.activation = bias, geometry, activation

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images of one shape and a residual of one dtype, or none; see `ConvolvesImages`."""
        w, bias, geometry, activation = self.weight, self.bias, self.geometry, self.activation

        def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return convolve_dense(x, w, bias, residual, geometry, activation)

        return convolve


def qconv2d_cpu(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    keep: bool,
) -> Tensor:
    dtype = computed_in(x.dtype)

    def dequantize(weight: PackedWeight) -> Tensor:
        return dequantize_packed(weight, dtype)

    with without_autocast():
        try:
            w = derived(weight, dtype, dequantize) if keep else dequantize(weight)
        except UnsuitableError:
            w = dequantize(weight)
        return convolve_dense(x, w, bias, residual, geometry, activation)
