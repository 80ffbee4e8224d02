"""Multiplies 8-bit rows with a packed weight on the CPU, summed as integers.

The C++ of 8-bit convolutions does it: rows are images of one pixel. It reads a byte a weight; so few rows with a large
weight of fewer bits take a loop that reads packed codes, for then memory is what takes the time. Where no C++ runs,
whole numbers are multiplied in fp32 by ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.program.recording import OperationCall, recording
from gs_kernels.qconv2d.cpu.int8_kernel import Kernel, forms_of, kernels
from gs_kernels.qconv2d.cpu.int8_plain import PlainSums
from gs_kernels.qconv2d.cpu.int8_weight import arrange, make_int8_weight
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qmatmul.cpu.float import without_autocast
from gs_kernels.qmatmul.cpu.interleaved import InterleavedWeight, interleaved
from gs_kernels.qmatmul.cpu.interleaved_product import int_dot_of
from gs_kernels.qmatmul.ref import qmatmul_int8_ref

MultipliesRows: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # int8 rows and their scale to `[..., N]`

FEW_ROWS = 4  # that read packed codes
LARGE = 1 << 20  # elements of a weight that is read from memory, not from a cache
LARGEST_GROUP = 1 << 15  # of products of 255 and -128, the sum, zero points taken off, is below 2**31
POINTWISE = ConvGeometry(1, 1)


def qmatmul_int8_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    with without_autocast():
        return Int8Product(weight, bias, x_zero, activation, dtype).at(x.shape)(x, x_scale)


class Int8Product:
    """Prepares `qmatmul_int8` on a CPU: everything but x and its scale is fixed; `at` fixes their shape too.

    Where sums might overflow, and for weights whose forms cannot be kept, it computes as the reference does.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, x_zero: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        self.weight, self.bias, self.x_zero, self.activation, self.dtype = weight, bias, x_zero, activation, dtype
        self.shift = whole_zero("qmatmul_int8", x_zero)

    def at(self, shape: Sequence[int]) -> MultipliesRows:
        """Returns the function of rows of one shape, `[..., K]`, and of their scale, as `qmatmul_int8` has them."""
        weight, m = self.weight, math.prod(shape[:-1])
        if m == 0 or not -128 <= self.shift <= 127:
            return self._as_reference
        reads_packed = weight.bits < 8 and m <= FEW_ROWS and math.prod(weight.shape) >= LARGE and kernels() is not None
        ways = (self._by_packed_codes, self._by_panels) if reads_packed else (self._by_panels, self._by_packed_codes)
        for way in ways:
            try:
                return way(shape, m)
            except UnsuitableError:
                continue
        return self._as_reference

    def _by_panels(self, shape: Sequence[int], m: int) -> MultipliesRows:
        weight, n, functions = self.weight, self.weight.shape[0], kernels()
        if functions is None:
            return self._by_operations(derived(weight, ("whole numbers", self.shift), self._plain))
        int8_weight, panels = derived(weight, "rows", lambda w: arrange(w, POINTWISE, forms_of(functions)))
        activated = ACTIVATIONS[self.activation].cpp is not None
        name = self.activation if activated else "none"
        kernel = Kernel(int8_weight, panels, POINTWISE, self.shift, self.bias, None, name)
        run, size, dtype = kernel.at(1, m, 1, rows=True), (*shape[:-1], n), self.dtype
        activate = None if activated else ACTIVATIONS[self.activation].function

        def product(x: Tensor, x_scale: Tensor) -> Tensor:
            y = run(x.contiguous(), x_scale, int(x_scale.numel() != 1)).view(size)
            y = y if activate is None else activate(y)
            return y if dtype == torch.float32 else y.to(dtype)

        return product

    def _plain(self, weight: PackedWeight) -> PlainSums:
        return PlainSums(make_int8_weight(weight), POINTWISE, self.shift)

    def _by_operations(self, sums: PlainSums) -> MultipliesRows:
        bias, activation, dtype = self.bias, ACTIVATIONS[self.activation].function, self.dtype

        def product(x: Tensor, x_scale: Tensor) -> Tensor:
            images = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
            y = sums(images).permute(0, 2, 3, 1).reshape(-1, self.weight.shape[0])
            y = y * (x_scale if x_scale.numel() == 1 else x_scale.reshape(-1, 1))
            y = activation(y if bias is None else y + bias.float())
            return y.to(dtype).contiguous().view(*x.shape[:-1], -1)

        return product

    def _by_packed_codes(self, shape: Sequence[int], m: int) -> MultipliesRows:
        if self.weight.group_size > LARGEST_GROUP:
            raise UnsuitableError(f"no int32 holds the sums of {self.weight.group_size:,} products")
        weight: InterleavedWeight = interleaved(self.weight)
        n, k = self.weight.shape
        one, size, shift = self.weight.scale.shape[1] == 1, (*shape[:-1], n), self.shift
        multiply, bias, dtype = int_dot_of(m, weight, one), self.bias, self.dtype
        activate = None if self.activation == "none" else ACTIVATIONS[self.activation].function

        def product(x: Tensor, x_scale: Tensor) -> Tensor:
            rows = x.reshape(m, k).to(torch.int16)
            y = multiply(rows - shift if shift else rows)[:, :n]
            y = y * (x_scale if x_scale.numel() == 1 else x_scale.reshape(-1, 1))
            y = y if bias is None else y + bias.float()
            y = (y if activate is None else activate(y)).to(dtype).contiguous().view(size)
            if recording.calls is not None:
                recording.calls.append(OperationCall(lambda x: product(x, x_scale), (x,), {}, y))
            return y

        return product

    def _as_reference(self, x: Tensor, x_scale: Tensor) -> Tensor:
        options: dict[str, Any] = {"x_zero": self.x_zero, "activation": self.activation, "dtype": self.dtype}
        return qmatmul_int8_ref(x, x_scale, self.weight, self.bias, **options)


def whole_zero(who: str, x_zero: Tensor | None, must: str = "a whole number") -> int:
    """Returns the zero point of x: the code that stands for 0.0, or that would if the grid reached so far."""
    value = 0.0 if x_zero is None else float(x_zero)
    if not value.is_integer():
        raise ValueError(f"{who}: x_zero must be {must}, got {value}")
    return int(value)
