"""Computes L1 products of 8-bit codes on the CPU by `int8.cpp`, or by tensor operations without it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.adder.unfolded import int8_by_operations, l1_products
from gs_kernels.cpu.library import load_functions
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.program.recording import COMPARE, KernelCall, Refusal, recording
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.ref import int8_epilogue, requant_params
from gs_kernels.requantize.passes import channels_last

PARALLEL_FROM = 1 << 18  # differences, from which a second thread pays
WORD = 8  # bytes whose differences one instruction adds up

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


class _AdderCodes(ctypes.Structure):
    _fields_ = [
        *((name, size) for name in ("batch", "h", "w", "channels", "p", "q", "outputs")),
        *((name, size) for name in ("r", "s", "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w")),
        *((name, pointer) for name in ("weight", "scale", "bias")),
        *((name, size) for name in ("words", "zero")),
        *((name, single) for name in ("inverse", "fraction", "whole")),
        *((name, number) for name in ("activation", "form")),
    ]


FORMS = {torch.int32: 0, torch.float32: 1, torch.int8: 2}  # of y, as int8.cpp numbers them
FUNCTIONS: dict[str, Sequence[Any]] = {"adder_codes": (ctypes.POINTER(_AdderCodes), *[pointer] * 5, ctypes.c_int)}


@cache
def kernels() -> Any:
    """Returns the functions of `int8.cpp`, or None if it does not compile or fails its self-test."""
    return load_functions("adder_int8", FUNCTIONS, _self_test, (_AdderCodes,))


def _self_test(functions: Any) -> bool:
    """Compares small products, with and without what may follow, with tensor operations."""
    x = (torch.arange(2 * 5 * 6 * 7) * 37 % 256 - 128).view(2, 5, 6, 7).to(torch.int8)
    w = (torch.arange(19 * 5 * 9) * 29 % 256 - 128).view(19, 5, 3, 3).to(torch.int8)
    geometry = ConvGeometry(3, 3, 2, 1, top=1, bottom=1, left=1, right=1)
    sums = l1_products(x, w, geometry, 5.0, torch.int32)
    scale, bias = torch.linspace(1e-3, 2e-3, 19), torch.linspace(-1, 4, 19)
    plain = Int8Adder(w, geometry, None, None, 5, (None, None, None), "none", torch.float32, functions)
    scaled = Int8Adder(w, geometry, scale, bias, 5, (None, None, None), "relu", torch.float32, functions)
    want = (sums.permute(0, 2, 3, 1) * scale + bias).relu().permute(0, 3, 1, 2)
    return torch.equal(plain(x), sums) and torch.equal(scaled(x), want)


class Int8Adder:
    """Prepares `adder_int8` on a CPU: everything but image and residual is fixed.

    Args:
        zero: the code that stands for 0.0.
        out: inverse scale of the result's codes, whole part and fraction of their zero point (`requant_params`).
        functions: the library, default `kernels()`.

    Raises:
        UnsuitableError: if there is no library.
    """

    def __init__(
        self,
        weight: Tensor,
        geometry: ConvGeometry,
        scale: Tensor | None,
        bias: Tensor | None,
        zero: int,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
        dtype: torch.dtype,
        functions: Any = None,
    ) -> None:
        self.functions = kernels() if functions is None else functions
        if self.functions is None:
            raise UnsuitableError("no C++ runs here")
        self.geometry, self.zero, self.activation, self.dtype, self.out = geometry, zero, activation, dtype, out
        self.in_cpp = ACTIVATIONS[activation].cpp is not None and (out[0] is not None or dtype == torch.float32)
        o = weight.shape[0]
        across = ctypes.c_int64.in_dll(self.functions, "adder_across").value
        k = weight[0].numel()
        words = weight.new_zeros((-(-o // across) * across, -(-k // WORD) * WORD), dtype=torch.int8)
        words[:o, :k] = weight.permute(0, 2, 3, 1).flatten(1)
        words = words.view(-1, across, words.shape[1] // WORD, WORD).transpose(1, 2).contiguous()
        self.words = words.view(torch.uint8) ^ 128
        self.outputs, self.k = o, k
        self.scale = None if scale is None else scale.detach().expand(o).contiguous()
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.made = (
            torch.int32 if scale is None else torch.int8 if self.in_cpp and out[0] is not None else torch.float32
        )
        self.grid = tuple(0.0 if t is None or not self.in_cpp else float(t) for t in (out[0], out[2], out[1]))

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """Computes y of an image, and of a residual, whose scale and zero point are given if it is codes."""
        g, (b, c, h, w) = self.geometry, x.shape
        p, q = g.output(h, w)
        y = torch.empty((b, self.outputs, p, q), dtype=self.made, device="cpu", memory_format=torch.channels_last)
        if y.numel():
            image = channels_last(x)
            if residual is not None:
                residual = residual if residual.dtype == torch.int8 else residual.float()
                residual = residual.contiguous(memory_format=torch.channels_last)
            held = self.words, self.scale, self.bias
            fixed = _AdderCodes(
                *(b, h, w, c, p, q, self.outputs, g.r, g.s, *g.stride, g.top, g.left, *g.dilation),
                *(None if t is None else t.data_ptr() for t in held),
                *(self.words.shape[1], self.zero, *self.grid),
                *(ACTIVATIONS[self.activation].cpp if self.in_cpp else 0, FORMS[self.made]),
            )
            pointers = (None if t is None else t.data_ptr() for t in (image, y, residual, scale, zero))
            threads = torch.get_num_threads() if y.numel() * self.k >= PARALLEL_FROM else 1
            self.functions.adder_codes(fixed, *pointers, threads)
            if recording.calls is not None:
                given = image, y, residual, (None, scale, zero), threads > 1
                recording.calls.append(KernelCall(COMPARE, fixed, held, *given))
        if self.scale is None or self.in_cpp:
            return y
        if recording.calls is not None:
            recording.calls.append(Refusal("what follows the L1 product is not computed in C++"))
        one = y.new_ones(1, dtype=torch.float32)
        rows = int8_epilogue(
            y.permute(0, 2, 3, 1), one, None, (None, None, None, *self.out), self.activation, self.dtype
        )
        return rows.permute(0, 3, 1, 2)


def whole_zero(zero: Tensor | None) -> int:
    """Returns the zero point of a grid, which must be a code."""
    value = 0.0 if zero is None else float(zero)
    if not (value.is_integer() and -128 <= value <= 127):
        raise ValueError(f"adder_int8: zero must be a whole number from -128 to 127, got {value}")
    return int(value)


def adder_int8_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    zero: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    try:
        run = Int8Adder(weight, geometry, scale, bias, whole_zero(zero), requant[3:], activation, dtype)
    except UnsuitableError:
        return int8_by_operations(x, weight, scale, bias, geometry, zero, requant, activation, dtype)
    return run(x, residual, residual_scale, residual_zero)
