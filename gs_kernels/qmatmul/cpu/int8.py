"""Multiplies 8-bit rows with a packed weight on the CPU, summed as integers.

Up to `FEW_ROWS` rows or `FEW_PRODUCTS` products, one loop in C++, as for float rows. With more, blocks of the weight,
a group at a time: as int8 and by ATen's product of int8 matrices where the CPU has instructions for it; else as whole
numbers in fp32, in stretches of K so short that fp32 holds all their sums.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.pack.derived import UnsuitableError, derived
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import codes_of
from gs_kernels.qmatmul.cpu.float import dequantized, epilogue, rows_of, without_autocast
from gs_kernels.qmatmul.cpu.interleaved import LANES, InterleavedWeight, interleaved
from gs_kernels.qmatmul.cpu.interleaved_product import OFFSET, add, int_dot_of, kernels
from gs_kernels.qmatmul.ref import qmatmul_int8_ref
from gs_kernels.runtime.instructions import multiplies_int8
from gs_kernels.runtime.torch_private import int_mm

logger = logging.getLogger(__name__)

MultipliesRows: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # int8 rows and their scale to `[..., N]`

# measured, 4096 x 4096: above, blocks and ATen's products take less time, where it has instructions for int8, and not
FEW_ROWS = {True: 16, False: 256}
FEW_PRODUCTS = 1 << 22  # measured, weights up to 512 x 2048, VNNI: above, blocks take less time
BLOCK = 1 << 23  # elements of a weight that are unpacked at a time
STRETCH = 1 << 10  # of K: so many products of -128 and -128 are 2**24
LARGEST_GROUP = 1 << 15  # of products of 255 and -128, the sum, zero points taken off, is below 2**31


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

    Where C++ does not run, or sums might overflow, it computes as the reference does.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, x_zero: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        self.weight, self.bias, self.x_zero, self.activation, self.dtype = weight, bias, x_zero, activation, dtype
        self.shift = whole_zero("qmatmul_int8", x_zero)
        self.interleaved: InterleavedWeight | None = None
        if -128 <= self.shift <= 127 and weight.group_size <= LARGEST_GROUP:
            self.interleaved = self._interleave()

    def _interleave(self) -> InterleavedWeight | None:
        if kernels() is None:  # the log says why
            return None
        try:
            return interleaved(self.weight)
        except UnsuitableError as error:
            logger.debug("qmatmul_int8 runs as its reference: %s", error)
            return None

    def at(self, shape: Sequence[int]) -> MultipliesRows:
        """Returns the function of rows of one shape, `[..., K]`, and of their scale, as `qmatmul_int8` has them."""
        weight, (n, k) = self.interleaved, self.weight.shape
        m = math.prod(shape[:-1])
        if weight is None or m == 0:
            return self._as_reference
        if not (m * k * n <= FEW_PRODUCTS or m <= FEW_ROWS[multiplies_int8()]):
            return self._by_blocks
        one, size, shift = self.weight.scale.shape[1] == 1, (*shape[:-1], n), self.shift
        multiply, bias, dtype = int_dot_of(m, weight, one), self.bias, self.dtype
        activate = None if self.activation == "none" else ACTIVATIONS[self.activation].function

        def product(x: Tensor, x_scale: Tensor) -> Tensor:
            rows = x.reshape(m, k).to(torch.int16)
            y = multiply(rows - shift if shift else rows)[:, :n]
            y = y * (x_scale if x_scale.numel() == 1 else x_scale.reshape(-1, 1))
            y = y if bias is None else y + bias.float()
            return (y if activate is None else activate(y)).to(dtype).contiguous().view(size)

        return product

    def _as_reference(self, x: Tensor, x_scale: Tensor) -> Tensor:
        options: dict[str, Any] = {"x_zero": self.x_zero, "activation": self.activation, "dtype": self.dtype}
        return qmatmul_int8_ref(x, x_scale, self.weight, self.bias, **options)

    def _by_blocks(self, x: Tensor, x_scale: Tensor) -> Tensor:
        assert self.interleaved is not None
        y = _by_blocks(rows_of(x, torch.int8), self.shift, self.weight, self.interleaved)
        y = y * (x_scale if x_scale.numel() == 1 else x_scale.reshape(-1, 1))
        return epilogue(y, self.bias, self.activation, self.dtype).view(*x.shape[:-1], self.weight.shape[0])


def whole_zero(who: str, x_zero: Tensor | None, must: str = "a whole number") -> int:
    """Returns the zero point of x: the code that stands for 0.0, or that would if the grid reached so far."""
    value = 0.0 if x_zero is None else float(x_zero)
    if not value.is_integer():
        raise ValueError(f"{who}: x_zero must be {must}, got {value}")
    return int(value)


def _by_blocks(x: Tensor, shift: int, weight: PackedWeight, interleaved_weight: InterleavedWeight) -> Tensor:
    as_int8 = multiplies_int8()
    dtype = torch.int8 if as_int8 else torch.float32
    groups, m = interleaved_weight.groups, x.shape[0]
    by_group = interleaved_weight.steps(x).view(m, groups, -1).transpose(0, 1).contiguous()  # [groups, M, width]
    x_sums = by_group.sum(2, dtype=torch.int32) - shift * weight.group_size  # [groups, M]
    by_group = by_group.to(dtype)
    code_sums = derived(weight, "code sums", _code_sums) if shift else None
    per_group = interleaved_weight.grid.shape[1] // groups
    ys: list[Tensor] = []
    done = 0
    for block, grid in dequantized(interleaved_weight, dtype, BLOCK if as_int8 else BLOCK // 4, as_codes=not as_int8):
        columns = block.view(groups, interleaved_weight.width, -1)
        y = torch.zeros(m, grid.shape[0], LANES)
        for g in range(groups):
            multiply = int_mm if as_int8 else _whole_product
            sums = multiply(by_group[g], columns[g]).view(y.shape)
            if code_sums is not None:
                sums -= shift * code_sums[g, done : done + grid.shape[0]]
            add(y, sums, x_sums[g], grid[:, g * per_group], interleaved_weight.bits)
        ys.append(y.flatten(1))
        done += grid.shape[0]
    return torch.cat(ys, 1)[:, : interleaved_weight.shape[0]]


def product_of_codes(x: Tensor, w: Tensor) -> Tensor:
    """Multiplies int8 x `[M, K]` and w `[N, K]` to int32 `[M, N]`, exactly."""
    if x.shape[1] == 1:  # of which torch 2.13 leaves the result unwritten
        return x.int() * w.t().int()
    return int_mm(x, w.t()) if multiplies_int8() else _whole_product(x.float(), w.t().float())


def _whole_product(x: Tensor, w: Tensor) -> Tensor:
    """Multiplies 8-bit codes x `[M, K]` and w `[K, N]` in fp32, which is exact to 2**24, to int32 `[M, N]`."""
    y = None
    for part, rows in zip(x.split(STRETCH, 1), w.split(STRETCH), strict=True):
        sums = (part @ rows).int()
        y = sums if y is None else y.add_(sums)
    assert y is not None
    return y


def _code_sums(weight: PackedWeight) -> Tensor:
    """Sums each group's codes, those of 8 bits 128 lower, to int32 `[G, B, 16]`."""
    codes = codes_of(weight)
    sums = codes.unflatten(1, (-1, weight.group_size)).sum(2, dtype=torch.int32)
    sums -= OFFSET * weight.group_size if weight.bits == 8 else 0
    rows = interleaved(weight).codes.shape[0] * LANES
    return pad(sums, (0, 0, 0, rows - sums.shape[0])).view(-1, LANES, sums.shape[1]).permute(2, 0, 1).contiguous()
