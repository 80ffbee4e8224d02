"""Convolves float images with a packed weight on the CPU: dequantizes its filters, then calls oneDNN, channels-last.

A weight is small against what an image takes to convolve with it: to dequantize it adds a tenth of the time at 8 images
of 56 x 56, and as much again at one of 7 x 7 with 512 channels. So a caller decides whether they are kept: then in the
order that oneDNN multiplies in, which is up to four times as fast as ATen's call of a float layer. Few products of
pixels alone are those of a matrix, which takes half of a small call of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed
from gs_kernels.qconv2d.dense import Convolves, by_filters, convolve_by, convolve_dense, filters_of
from gs_kernels.qconv2d.geometry import ConvGeometry, ConvolvesImages
from gs_kernels.qmatmul.cpu.float import computed_in, without_autocast
from gs_kernels.runtime.dispatch import backend_setting
from gs_kernels.runtime.instructions import has
from gs_kernels.runtime.torch_private import PLAIN, autocasts, convolve_prepacked, is_plain_call, prepack_filters

# products in a call from which filters are prepacked: below them the longer call takes more than it saves. None of
# groups, which ATen itself always leaves to oneDNN; of pixels alone a matrix product wins longer without AVX-512
LEAST, LEAST_IN_GROUPS, LEAST_POINTWISE, LEAST_POINTWISE_AVX512 = 1 << 18, 0, 6 << 20, 2 << 20
LONGEST = 4096  # numbers in a sum of a matrix product: 16,411 came out 1e-6 from what a convolution gives
MAX_LAYOUTS = 4  # of the filters of one weight, for sizes of images; others have ATen's call
MAX_CALLS = 64  # of one weight, which may see images of ever new sizes

Bound: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # of image, bias and residual


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
        self.weight, self.dtype = weight, dtype
        self.bias, self.geometry, self.activation = bias, geometry, activation

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images of one shape and a residual of one dtype, or none; see `ConvolvesImages`."""
        bias = self.bias
        dtypes = self.dtype, None if bias is None else bias.dtype, residual
        run = _bind(self.weight, self.geometry, self.activation, shape, *dtypes)
        return lambda x, residual=None: run(x, bias, residual)


def _bind(
    weight: PackedWeight,
    geometry: ConvGeometry,
    activation: str,
    shape: Sequence[int],
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> Bound:
    """Returns the convolution for images of one shape and dtypes; it holds what was made of the weight, not itself."""
    dtype = computed_in(x_dtype)
    convolve = _by_prepacked(weight, geometry, shape, dtype) or _by_dense(weight, geometry, dtype)
    if x_dtype != dtype or bias_dtype not in (None, dtype) or residual_dtype is not None or not geometry.is_symmetric:
        return lambda x, bias, residual: convolve_by(convolve, x, dtype, bias, residual, geometry, activation)
    finish, padding, last = ACTIVATIONS[activation].in_place, (geometry.top, geometry.left), torch.channels_last
    return lambda x, bias, residual: finish(convolve(x, bias, padding)).contiguous(memory_format=last)


def _by_dense(weight: PackedWeight, geometry: ConvGeometry, dtype: torch.dtype) -> Convolves:
    w = derived(weight, dtype, lambda weight: dequantize_packed(weight, dtype))
    if geometry.is_pointwise and geometry.groups == 1 and dtype == torch.float32 and w.shape[1] <= LONGEST:
        return lambda image, bias, padding: linear(image.permute(0, 2, 3, 1), w, bias).permute(0, 3, 1, 2)
    return by_filters(filters_of(w, geometry), geometry)


def _by_prepacked(
    weight: PackedWeight, geometry: ConvGeometry, shape: Sequence[int], dtype: torch.dtype
) -> Convolves | None:
    """Returns the convolution with filters that lie as oneDNN multiplies them; None where a call gains nothing.

    ATen's own call lays them anew each time. oneDNN lays them by the size of images, and otherwise for one than for
    several: with those of another size, or number, it takes up to 60 times as long.
    """
    b, c, h, w = shape
    products = b * math.prod(geometry.output(h, w)) * math.prod(weight.shape)
    prepack, run = prepack_filters, convolve_prepacked
    if products < _least(geometry) or prepack is None or run is None or not torch.backends.mkldnn.is_available():
        return None
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    padding = geometry.top, geometry.left
    if not geometry.is_symmetric:
        padding = 0, 0
        h, w = h + geometry.top + geometry.bottom, w + geometry.left + geometry.right

    def build(weight: PackedWeight) -> Tensor:
        filters = filters_of(dequantize_packed(weight, dtype), geometry)
        return prepack(filters, padding, stride, dilation, groups, [images, c, h, w])

    images = min(b, 2)
    layout = (dtype, geometry, images, h, w)
    layouts: set[Any] = derived(weight, "layouts", lambda weight: set())
    if layout not in layouts and len(layouts) >= MAX_LAYOUTS:
        return None
    layouts.add(layout)
    filters = derived(weight, layout, build)
    return lambda image, bias, padding: run(image, filters, bias, padding, stride, dilation, groups, "none", (), "")


def _least(geometry: ConvGeometry) -> int:
    if geometry.groups > 1:
        return LEAST_IN_GROUPS
    if geometry.taps > 1:
        return LEAST
    return LEAST_POINTWISE_AVX512 if has("avx512_f") else LEAST_POINTWISE


def _calls_of(weight: PackedWeight) -> dict[Any, Bound]:
    """Returns the bound convolutions of a weight as it is now; raises UnsuitableError if nothing can be kept."""
    return derived(weight, "convolutions", lambda weight: {})


def _form(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: ConvGeometry, activation: str
) -> tuple[Any, ...]:
    """Returns all that checks, and the choice of a way, look at beside the weight."""
    form: tuple[Any, ...] = (geometry, activation, x.shape, x.dtype)
    for t in (bias, residual):
        form += (None,) if t is None else (type(t), t.shape, t.dtype, t.device)
    return form


def repeated(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
) -> Tensor | None:
    """Does as `qconv2d_cpu` that keeps the filters, if a call of this form did before; else returns None.

    The arguments need no checks: those of that call were right.
    """
    if torch.compiler.is_compiling() or type(x) not in PLAIN or not x.is_cpu or type(weight) is not PackedWeight:
        return None
    if backend_setting() or autocasts() or not is_plain_call(x):
        return None
    try:
        run = _calls_of(weight).get(_form(x, bias, residual, geometry, activation))
    except (UnsuitableError, TypeError, AttributeError):  # the last two: of arguments that no call can have
        return None
    if run is None or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (bias, residual))):
        return None
    return run(x, bias, residual)


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
                calls = _calls_of(weight)
            except UnsuitableError:
                pass
            else:
                key = _form(x, bias, residual, geometry, activation)
                run = calls.get(key)
                if run is None:
                    if len(calls) >= MAX_CALLS:
                        calls.clear()
                    added = [None if t is None else t.dtype for t in (bias, residual)]
                    run = calls[key] = _bind(weight, geometry, activation, x.shape, x.dtype, *added)
                return run(x, bias, residual)
        w = dequantize_packed(weight, computed_in(x.dtype))
        return convolve_dense(x, w, bias, residual, geometry, activation)
