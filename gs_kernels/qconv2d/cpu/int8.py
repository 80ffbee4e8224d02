"""Convolves 8-bit images with a packed weight on the CPU: in C++, else as whole numbers in fp32 by ATen.

The C++ goes from codes to codes in one pass. It has not all activations and dtypes: then it gives fp32, and operations
of PyTorch follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.program.recording import OperationCall, noted, recording
from gs_kernels.qconv2d.cpu.int8_kernel import Kernel, forms_of, kernels
from gs_kernels.qconv2d.cpu.int8_plain import PlainSums
from gs_kernels.qconv2d.cpu.int8_weight import Int8Weight, Panels, arrange, make_int8_weight
from gs_kernels.qconv2d.geometry import ConvGeometry, ConvolvesImages
from gs_kernels.qconv2d.ref import convolve_int8_ref, int8_epilogue, requant_params
from gs_kernels.qmatmul.cpu.float import without_autocast
from gs_kernels.qmatmul.cpu.int8 import whole_zero
from gs_kernels.requantize.passes import channels_last, to_codes_of

Residual: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]  # itself, and scale and zero point of codes

NOTHING: Residual = (None, None, None)
_channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)


def qconv2d_int8_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    with without_autocast():
        try:
            run = Int8Convolution(weight, geometry, x_scale, x_zero, bias, requant[3:], activation, dtype, keep)
        except UnsuitableError:
            return convolve_int8_ref(x, x_scale, x_zero, weight, bias, requant, geometry, activation, dtype)
        return run.at(x.shape, None if residual is None else residual.dtype)(x, *requant[:3])


class Int8Convolution:
    """Prepares `qconv2d_int8` on a CPU: everything but image and residual is fixed; `at` fixes their shape too.

    Args:
        out: inverse scale of the result's codes, whole part and fraction of their zero point (`requant_params`).
        keep: whether the forms of the weight are kept while the packed codes live, for other convolutions with it.
        limits: the least and largest code of the result.

    Raises:
        UnsuitableError: if sums of 8-bit products cannot give the result.
    """

    def __init__(
        self,
        weight: PackedWeight,
        geometry: ConvGeometry,
        x_scale: Tensor,
        x_zero: Tensor | None,
        bias: Tensor | None,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
        dtype: torch.dtype,
        keep: bool,
        limits: tuple[int, int] = (-128, 127),
    ) -> None:
        self.geometry, self.shift = geometry, _padding_code(x_zero)
        self.x_scale, self.bias, self.out, self.limits = x_scale.detach(), bias, out, limits
        self.activation, self.dtype = activation, dtype
        self.in_cpp = ACTIVATIONS[activation].cpp is not None and (out[0] is not None or dtype == torch.float32)
        self.grid: tuple[float, ...] | None = None
        self.kernel: Kernel | None = None
        self.plain: PlainSums | None = None

        functions = kernels()
        if functions is None:
            self.plain = PlainSums(make_int8_weight(weight), geometry, self.shift)
            return

        def arranged(weight: PackedWeight) -> tuple[Int8Weight, Panels]:
            return arrange(weight, geometry, forms_of(functions))

        int8_weight, panels = derived(weight, ("images", geometry), arranged) if keep else arranged(weight)
        if out[0] is not None:
            inverse, whole, fraction = (0.0 if t is None else float(t) for t in out)
            self.grid = (inverse, fraction, whole, float(limits[0]), float(limits[1]))
        grid, name = (self.grid, activation) if self.in_cpp else (None, "none")
        self.kernel = Kernel(int8_weight, panels, geometry, self.shift, bias, grid, name)

    def at(self, shape: Sequence[int], residual: torch.dtype | None = None) -> ConvolvesImages:
        """Returns the function of images of one shape and a residual of one dtype, or none; see `ConvolvesImages`."""
        b, _, h, w = shape
        if self.kernel is None or not b:
            return self._by_operations
        run, x_scale = self.kernel.at(b, h, w), self.x_scale
        if not self.in_cpp or residual not in (None, torch.int8, torch.float32):
            return self._with_operations(run)

        def convolve(
            x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
        ) -> Tensor:
            if residual is None:
                return run(channels_last(x), x_scale)
            return run(channels_last(x), x_scale, 0, noted(_channels_last, residual), scale, zero)

        return convolve

    def _with_operations(self, run: Callable[..., Tensor]) -> ConvolvesImages:
        """Returns the function where the C++ lacks a part: it adds up and scales, in fp32, and operations follow."""
        assert self.kernel is not None
        x_scale, in_cpp = self.x_scale, self.in_cpp  # in_cpp: the residual alone is of another dtype

        def convolve(
            x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
        ) -> Tensor:
            added = None if residual is None else noted(_channels_last, residual)
            if added is not None and scale is None:
                added = noted(Tensor.float, added)
            y = run(channels_last(x), x_scale, 0, added, scale, zero)
            return y if in_cpp else self._activate(y)

        return convolve

    def _activate(self, y: Tensor) -> Tensor:
        """Makes the result of fp32 values that only activation, grid and dtype are missing of."""
        activate, sums = ACTIVATIONS[self.activation].in_place, y
        y = activate(sums)
        if recording.calls is not None:
            recording.calls.append(OperationCall(activate, (sums,), {}, y))
        to_codes = None if self.grid is None else to_codes_of(y.numel(), self.grid, 0)
        if to_codes is not None:
            return to_codes(y)
        return noted(lambda y: self._finish(y, self.x_scale.new_ones(1), None, activation="none"), y)

    def _finish(
        self, y: Tensor, x_scale: Tensor, bias: Tensor | None, residual: Residual = NOTHING, *, activation: str
    ) -> Tensor:
        """Makes the result of fp32 sums by `int8_epilogue`, within the limits."""
        y = int8_epilogue(y, x_scale, bias, (*residual, *self.out), activation, self.dtype)
        return y if self.out[0] is None or self.limits == (-128, 127) else y.clamp_(*self.limits)

    def _by_operations(
        self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        if self.plain is None:  # no images
            p, q = self.geometry.output(*x.shape[2:])
            sums = x.new_zeros((0, self.kernel.outputs if self.kernel else 0, p, q), dtype=torch.float32)
        else:
            sums = self.plain(x)
        rows = None if residual is None else residual.permute(0, 2, 3, 1)
        sums, added = sums.permute(0, 2, 3, 1), (rows, scale, zero)
        y = self._finish(sums, self.x_scale, self.bias, added, activation=self.activation)
        return y.contiguous().permute(0, 3, 1, 2)


def _padding_code(x_zero: Tensor | None) -> int:
    """Returns the zero point of x, which pads it; raises unless it is a code."""
    must = "a whole number from -128 to 127"
    value = whole_zero("qconv2d_int8", x_zero, must)
    if not -128 <= value <= 127:
        raise ValueError(f"qconv2d_int8: x_zero must be {must}, got {value}")
    return value
