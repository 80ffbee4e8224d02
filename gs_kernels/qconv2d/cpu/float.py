"""Convolves float images with a packed weight on the CPU: dequantizes its filters, then calls oneDNN, channels-last.

A weight is small against what an image takes to convolve with it: to dequantize it adds a tenth of the time at 8 images
of 56 x 56, and as much again at one of 7 x 7 with 512 channels. So a caller decides whether they are kept: then in the
order that oneDNN multiplies in, which is up to four times as fast as ATen's call of a float layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qconv2d.dense import Convolves, by_filters, convolve_by, convolve_dense, filters_of
from gs_kernels.qconv2d.geometry import ConvGeometry, ConvolvesImages
from gs_kernels.qmatmul.cpu.float import computed_in, without_autocast
from gs_kernels.runtime.torch_private import convolve_prepacked, prepack_filters

# products in a call from which filters are prepacked: below them the longer call takes more than it saves
LEAST, LEAST_POINTWISE = 1 << 18, 1 << 23


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
        derived(weight, "nothing", lambda weight: None)  # raises if nothing can be kept
        self.weight, self.dtype = weight, computed_in(dtype)
        self.bias, self.geometry, self.activation = bias, geometry, activation

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images of one shape and a residual of one dtype, or none; see `ConvolvesImages`."""
        dtype, bias, geometry, activation = self.dtype, self.bias, self.geometry, self.activation
        convolve = self._by_prepacked(shape)
        if convolve is None:
            w = derived(self.weight, dtype, lambda weight: dequantize_packed(weight, dtype))
            convolve = by_filters(filters_of(w, geometry), geometry)
        return lambda x, residual=None: convolve_by(convolve, x, dtype, bias, residual, geometry, activation)

    def _by_prepacked(self, shape: Sequence[int]) -> Convolves | None:
        """Returns the convolution with filters that lie as oneDNN multiplies them; None where a call gains nothing.

        ATen's own call lays them anew each time.
        """
        geometry, dtype = self.geometry, self.dtype
        b, c, h, w = shape
        products = b * math.prod(geometry.output(h, w)) * math.prod(self.weight.shape)
        few = products < (LEAST_POINTWISE if geometry.taps == 1 else LEAST)
        if few or prepack_filters is None or convolve_prepacked is None or not torch.backends.mkldnn.is_available():
            return None
        prepack, run = prepack_filters, convolve_prepacked
        stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
        padding = geometry.top, geometry.left
        if not geometry.is_symmetric:
            padding = 0, 0
            h, w = h + geometry.top + geometry.bottom, w + geometry.left + geometry.right

        def build(weight: PackedWeight) -> Tensor:
            filters = filters_of(dequantize_packed(weight, dtype), geometry)
            return prepack(filters, padding, stride, dilation, groups, [1, c, h, w])

        filters = derived(self.weight, (dtype, "prepacked", geometry), build)
        return lambda image, bias, padding: run(image, filters, bias, padding, stride, dilation, groups, "none", (), "")


def qconv2d_cpu(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    keep: bool,
) -> Tensor:
    with without_autocast():
        if keep and x.numel():
            try:
                run = FloatConvolution(weight, geometry, bias, activation, x.dtype).at(x.shape)
            except UnsuitableError:
                pass
            else:
                return run(x, residual)
        w = dequantize_packed(weight, computed_in(x.dtype))
        return convolve_dense(x, w, bias, residual, geometry, activation)
