"""Calls `direct_int8.cpp`: direct convolutions of 8-bit images, their epilogue, and passes over codes.

oneDNN's depthwise convolution takes a pass in front, to make the codes unsigned, and one behind, from fp32 to codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.cpu.library import load_functions
from gs_kernels.qconv2d.geometry import ConvGeometry

LANES = 16  # channels of a depthwise convolution are a multiple of
PARALLEL_FROM = 1 << 15  # products, or numbers of y, from which a second thread pays: measured

# convolves images of one shape; takes the image and, if there is a residual, it and, of codes, their scale and zero
# point; returns `[B, O, P, Q]`, channels-last
ConvolvesImages: TypeAlias = Callable[..., Tensor]

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p
IMAGE = ("batch", "h", "w", "c", "p", "q", "r", "s", "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w")


class _Image(ctypes.Structure):
    _fields_ = [(name, size) for name in IMAGE]


class _Epilogue(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("scale", "bias", "of_zero")),
        *((name, single) for name in ("x_scale", "inverse", "fraction", "whole")),
        *((name, number) for name in ("shift", "twice", "activation", "codes")),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [("data", pointer), *((name, size) for name in ("rows", "channels", "are_whole"))]


class _Residual(ctypes.Structure):
    _fields_ = [("data", pointer), ("is_codes", size), ("scale", single), ("zero", single)]


NOTHING = _Residual(None, 0, 1.0, 0.0)


class _Sum(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("a", "b")),
        *((name, single) for name in ("a_scale", "a_zero", "b_scale", "b_zero")),
        *((name, single) for name in ("inverse", "fraction", "whole", "least", "largest")),
        *((name, number) for name in ("activation", "codes")),
    ]


STRUCTS = (_Image, _Epilogue, _Sums, _Residual, _Sum)


def _filter_of(geometry: ConvGeometry) -> tuple[int, ...]:
    """Returns the fields of `_Image` that follow its sizes."""
    return geometry.r, geometry.s, *geometry.stride, geometry.top, geometry.left, *geometry.dilation


def _adds(residual: Tensor, scale: Tensor | None, zero: Tensor | None) -> _Residual:
    numbers = (1.0 if scale is None else float(scale), 0.0 if zero is None else float(zero))
    return _Residual(residual.data_ptr(), scale is not None, *numbers)


class Int8Epilogue:
    """Makes `[M, O]` of the sums of one group, as `int8_epilogue` of ref.py; everything fixed but what it adds up.

    Args:
        functions: `kernels()`.
        codes, twice: int8 `[O, K]` and a number, as `int8.Int8Weight` holds them; shift: the zero point of x.
        scale: `[O]`.
        bias: `[O]`.
        out: as `Int8Convolution` takes it.
    """

    def __init__(
        self,
        functions: Any,
        codes: Tensor,
        twice: int,
        shift: int,
        scale: Tensor,
        x_scale: Tensor,
        bias: Tensor | None,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
    ) -> None:
        self.functions = functions
        self.scale, self.bias = scale.float().contiguous(), None if bias is None else bias.float().contiguous()
        inverse, whole, fraction = (0.0 if t is None else float(t) for t in out)
        self.dtype = torch.float32 if out[0] is None else torch.int8
        self.of_zero = codes.sum(1, dtype=torch.int32) * -shift
        pointers = self.scale.data_ptr(), None if self.bias is None else self.bias.data_ptr(), self.of_zero.data_ptr()
        singles = float(x_scale), inverse, fraction, whole
        numbers = shift, twice, ACTIVATIONS[activation].cpp, self.dtype == torch.int8
        self.params = _Epilogue(*pointers, *singles, *numbers)

    def accepts(self, residual: torch.dtype | None) -> bool:
        return residual in (None, torch.int8, torch.float32)

    def __call__(self, sums: Tensor, residual: Tensor | None, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Makes y of sums: int32 of the codes of x as they are, or fp32 of those less their zero point."""
        sums, y = sums.contiguous(), torch.empty(sums.shape, dtype=self.dtype)
        residual = None if residual is None else residual.contiguous()
        operand = _Sums(sums.data_ptr(), *sums.shape, sums.dtype == torch.int32)
        added = NOTHING if residual is None else _adds(residual, scale, zero)
        threads = torch.get_num_threads() if y.numel() >= PARALLEL_FROM else 1
        self.functions.int8_epilogue(operand, added, y.data_ptr(), self.params, threads)
        return y


class Depthwise:
    """Computes `qconv2d_int8` of images with as many channels as y, without a residual; all fixed but the image.

    Args:
        epilogue: what follows the sums.
        codes: int8 `[C, taps]`.
    """

    def __init__(self, epilogue: Int8Epilogue, codes: Tensor, geometry: ConvGeometry) -> None:
        self.epilogue, self.geometry, self.filter = epilogue, geometry, _filter_of(geometry)
        self.weight = codes.t().contiguous().to(torch.int32)

    def at(self, b: int, c: int, h: int, w: int) -> ConvolvesImages:
        """Returns the function of images of one shape; see `ConvolvesImages`."""
        p, q = self.geometry.output(h, w)
        like, image = _without_memory((b, c, p, q), self.epilogue.dtype), _Image(b, h, w, c, p, q, *self.filter)
        run, weight, params = self.epilogue.functions.depthwise_int8, self.weight, self.epilogue.params
        parallel = b * c * p * q * self.geometry.taps >= PARALLEL_FROM

        def convolve(x: Tensor, *_: None) -> Tensor:
            x, y = x.contiguous(memory_format=torch.channels_last), torch.empty_like(like)
            threads = torch.get_num_threads() if parallel else 1
            run(x.data_ptr(), weight.data_ptr(), y.data_ptr(), image, params, threads)
            return y

        return convolve


class Dense:
    """Computes `qconv2d_int8` of all channels; everything fixed but the image and what is added.

    Args:
        epilogue: what follows the sums.
        codes: int8 `[O, taps * C]`.
    """

    def __init__(self, epilogue: Int8Epilogue, codes: Tensor, geometry: ConvGeometry) -> None:
        self.epilogue, self.geometry, self.filter = epilogue, geometry, _filter_of(geometry)
        self.channels = codes.shape[0]
        rows = codes.view(self.channels, geometry.taps, -1).to(torch.int16)
        rows = pad(rows, (0, rows.shape[2] % 2, 0, 0, 0, -self.channels % LANES))
        pairs = rows.contiguous().view(torch.int32)  # [O, taps, pairs of C]
        self.weight = pairs.view(-1, LANES, pairs[0].numel()).transpose(1, 2).contiguous()

    def at(self, b: int, c: int, h: int, w: int) -> ConvolvesImages:
        """Returns the function of images of one shape; see `ConvolvesImages`."""
        (p, q), channels = self.geometry.output(h, w), self.channels
        like, image = _without_memory((b, channels, p, q), self.epilogue.dtype), _Image(b, h, w, c, p, q, *self.filter)
        run, weight, params = self.epilogue.functions.dense_int8, self.weight, self.epilogue.params
        parallel = b * channels * p * q * c * self.geometry.taps >= 4 * PARALLEL_FROM

        def convolve(
            x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, zero: Tensor | None = None
        ) -> Tensor:
            x, y, added = x.contiguous(memory_format=torch.channels_last), torch.empty_like(like), NOTHING
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
                added = _adds(residual, scale, zero)
            threads = torch.get_num_threads() if parallel else 1
            run(x.data_ptr(), weight.data_ptr(), y.data_ptr(), image, channels, added, params, threads)
            return y

        return convolve


def _without_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Makes a channels-last tensor that `torch.empty_like` takes: that is half the time of `torch.empty`."""
    like = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    like.untyped_storage().resize_(0)
    return like


def center_codes(x: Tensor, zero: int) -> Tensor:
    """Subtracts their zero point from int8 codes of any strides that leave no gaps: fp32 in the same order."""
    functions = kernels()
    if functions is None:
        return x.float().sub_(zero)
    y = torch.empty_like(x, dtype=torch.float32)
    functions.center_codes(x.data_ptr(), y.data_ptr(), x.numel(), zero, _threads(x))
    return y


def to_codes_of(count: int, grid: Sequence[float], moved: int) -> Callable[[Tensor], Tensor] | None:
    """Returns the function that quantizes dense fp32 tensors of so many elements on one grid to int8 codes, in order.

    grid: inverse of the scale, fraction and whole part of the zero point, least and largest code.
    moved: added to them.
    None if the C++ does not run.
    """
    functions = kernels()
    if functions is None:
        return None
    run, parallel = functions.to_codes, count >= PARALLEL_FROM

    def quantize(x: Tensor) -> Tensor:
        y, threads = torch.empty_like(x, dtype=torch.int8), torch.get_num_threads() if parallel else 1
        run(x.data_ptr(), y.data_ptr(), count, *grid, moved, threads)
        return y

    return quantize


def sum_codes_of(
    a: tuple[float, float], b: tuple[float, float] | None, activation: str, grid: Sequence[float] | None
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """Returns the function that computes `act(a + b)` of dense int8 codes in one order: fp32, or codes.

    a, b: scale and zero point of each; b: None if nothing is added. grid: as `to_codes_of` takes it.
    None if the C++ does not run, or does not know the activation.
    """
    functions = kernels()
    if functions is None or ACTIVATIONS[activation].cpp is None:
        return None
    run, to_floats = functions.sum_codes, grid is None
    numbers = (0.0, 0.0, 0.0, 0.0, 0.0) if grid is None else grid
    fixed = _Sum(None, None, *a, *(b or (1.0, 0.0)), *numbers, ACTIVATIONS[activation].cpp, grid is not None)

    def add(codes: Tensor, other: Tensor | None) -> Tensor:
        # naming the dtype that it has anyway takes a fifth of the time more
        y = torch.empty_like(codes, dtype=torch.float32) if to_floats else torch.empty_like(codes)
        params, count = _Sum.from_buffer_copy(fixed), codes.numel()
        params.a, params.b = codes.data_ptr(), None if other is None else other.data_ptr()
        run(params, y.data_ptr(), count, torch.get_num_threads() if count >= PARALLEL_FROM else 1)
        return y

    return add


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1


def supports_epilogue(activation: str, dtype: torch.dtype, codes: bool) -> bool:
    """Says whether the C++ runs here and has this activation and result."""
    return ACTIVATIONS[activation].cpp is not None and (codes or dtype == torch.float32) and kernels() is not None


def supports_depthwise(channels: int, k: int, geometry: ConvGeometry) -> bool:
    """Says whether the C++ does such a depthwise convolution, if it supports its epilogue."""
    return geometry.groups == channels and k == geometry.taps and channels % LANES == 0


@cache
def kernels() -> Any:
    """Returns the compiled functions, or None if they do not compile or fail the self-test."""
    params = ctypes.POINTER(_Epilogue)
    functions: dict[str, Sequence[Any]] = {
        "int8_epilogue": [ctypes.POINTER(_Sums), ctypes.POINTER(_Residual), pointer, params, ctypes.c_int],
        "depthwise_int8": [pointer, pointer, pointer, ctypes.POINTER(_Image), params, ctypes.c_int],
        "dense_int8": [*[pointer] * 3, ctypes.POINTER(_Image), size, ctypes.POINTER(_Residual), params, ctypes.c_int],
        "center_codes": [pointer, pointer, size, single, ctypes.c_int],
        "to_codes": [pointer, pointer, size, *[single] * 5, ctypes.c_int, ctypes.c_int],
        "sum_codes": [ctypes.POINTER(_Sum), pointer, size, ctypes.c_int],
    }
    return load_functions("qconv2d_int8", functions, self_test, STRUCTS)


def self_test(functions: Any) -> bool:
    """Checks one small convolution of each kind, the epilogue, and the passes over codes."""
    x = (torch.arange(16 * 25) * 37 % 256 - 128).view(1, 16, 5, 5)
    codes = torch.arange(16 * 9) * 29 % 256 - 128
    geometry = ConvGeometry(3, 3, top=1, bottom=1, left=1, right=1, groups=16)
    scale, bias, x_scale = torch.linspace(1e-3, 2e-3, 16), torch.linspace(-1, 1, 16), torch.tensor([0.3])
    weight = codes.to(torch.int8).view(16, 9)
    epilogue = Int8Epilogue(functions, weight, 2, 5, scale, x_scale, bias, (None, None, None), "relu")
    sums = conv2d((x - 5).double(), codes.double().view(16, 1, 3, 3), padding=1, groups=16).permute(0, 2, 3, 1)
    want = (sums.float() * scale * x_scale + bias).relu()
    convolve = Depthwise(epilogue, weight, geometry).at(1, 16, 5, 5)
    got = convolve(x.to(torch.int8)).permute(0, 2, 3, 1), epilogue(sums.float().view(25, 16), None, None, None)
    tall = torch.arange(24 * 27).view(24, 9, 3) * 31 % 256 - 128
    rows = tall.view(24, 27).to(torch.int8)
    wide = ConvGeometry(3, 3, top=1, bottom=1, left=1, right=1)
    all_of = Int8Epilogue(functions, rows, 1, 5, torch.ones(24), torch.ones(1), None, (None, None, None), "none")
    mixed = conv2d((x[:, :3] - 5).double(), tall.movedim(2, 1).reshape(24, 3, 3, 3).double(), padding=1).float()
    y, flat = torch.empty(16 * 25), x.to(torch.int8).flatten()
    functions.center_codes(flat.data_ptr(), y.data_ptr(), 400, 5.0, 1)
    back = torch.empty_like(flat)
    functions.to_codes(y.data_ptr(), back.data_ptr(), 400, 0.5, 0.0, -20.0, -100.0, 90.0, 1, 1)
    codes = ((flat.float() - 5) * 0.5).round().sub(20).clamp(-100, 90).add(1).to(torch.int8)
    added = torch.empty(400)
    params = _Sum(flat.data_ptr(), back.data_ptr(), 0.5, 3.0, 0.25, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 0)
    functions.sum_codes(params, added.data_ptr(), 400, 1)
    return (
        torch.equal(got[0], want)
        and torch.equal(got[1], want.view(25, 16))
        and torch.equal(Dense(all_of, rows, wide).at(1, 3, 5, 5)(x[:, :3].to(torch.int8)), mixed * 0.5)
        and torch.equal(y, flat.float() - 5)
        and torch.equal(back, codes)
        and torch.equal(added, ((flat.float() - 3) * 0.5 + (codes.float() + 2) * 0.25).relu())
    )
