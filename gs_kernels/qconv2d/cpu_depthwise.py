"""Depthwise convolutions of 8-bit images in C++, for CPUs with AVX-512: one pass from codes to codes.

oneDNN's convolution of codes takes a pass in front, to make them unsigned, and one behind, from fp32 to codes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gs_kernels.compiled import native
from gs_kernels.qconv2d.window import Window

NEEDS = ("avx512_f", "avx512_bw", "avx512_vl")
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
LANES = 16  # channels are a multiple of
PARALLEL_FROM = 1 << 15  # products, from which a second thread pays: measured

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p
IMAGE = ("batch", "h", "w", "c", "p", "q", "r", "s", "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w")


class _Image(ctypes.Structure):
    _fields_ = [(name, size) for name in IMAGE]


class _After(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("scale", "bias", "of_zero")),
        *((name, single) for name in ("x_scale", "inverse", "fraction", "whole")),
        *((name, number) for name in ("shift", "twice", "activation", "codes")),
    ]


class Depthwise:
    """`qconv2d_int8` of images with as many channels as y, without a residual; everything fixed but the image.

    Args:
        functions: `depthwise_library()`.
        codes, twice: int8 `[C, taps]` and a number, as `cpu_int8.Codes` holds them; shift: the zero point of x.
        scale: fp32 `[C]`.
        bias: fp32 `[C]`.
        out: as `Int8Convolution` takes it.
    """

    def __init__(
        self,
        functions: Any,
        codes: Tensor,
        twice: int,
        window: Window,
        shift: int,
        scale: Tensor,
        x_scale: Tensor,
        bias: Tensor | None,
        out: tuple[Tensor | None, Tensor | None, Tensor | None],
        activation: str,
    ) -> None:
        self.window, self.functions = window, functions
        self.weight = codes.t().contiguous().to(torch.int32)
        self.scale, self.bias = scale.float().contiguous(), None if bias is None else bias.float().contiguous()
        inverse, whole, fraction = (0.0 if t is None else float(t) for t in out)
        self.codes = out[0] is not None
        self.of_zero = self.weight.sum(0, dtype=torch.int32) * -shift
        pointers = self.scale.data_ptr(), None if self.bias is None else self.bias.data_ptr(), self.of_zero.data_ptr()
        singles = float(x_scale), inverse, fraction, whole
        self.after = _After(*pointers, *singles, shift, twice, ACTIVATIONS[activation], self.codes)

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, P, Q, C]`, contiguous, int8 or fp32."""
        x = x.permute(0, 2, 3, 1).contiguous()
        (b, h, w, c), about = x.shape, self.window
        p, q = about.output(h, w)
        y = torch.empty(b, p, q, c, dtype=torch.int8 if self.codes else torch.float32)
        steps = about.stride_h, about.stride_w, about.top, about.left, about.dilation_h, about.dilation_w
        image = _Image(b, h, w, c, p, q, about.r, about.s, *steps)
        threads = torch.get_num_threads() if y.numel() * about.taps >= PARALLEL_FROM else 1
        self.functions.depthwise_int8(x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), image, self.after, threads)
        return y


def suits(channels: int, k: int, window: Window, activation: str, dtype: torch.dtype, codes: bool) -> bool:
    """Whether the C++ is there and does such a convolution."""
    depthwise = window.groups == channels and k == window.taps and channels % LANES == 0
    known = activation in ACTIVATIONS and (codes or dtype == torch.float32)
    return depthwise and known and depthwise_library() is not None


@cache
def depthwise_library() -> Any:
    """The compiled code; None if this CPU lacks its instructions, or it does not compile or computes something else."""
    able = torch.cpu.get_capabilities()
    if not all(able.get(name) for name in NEEDS):
        return None
    argtypes = [pointer, pointer, pointer, ctypes.POINTER(_Image), ctypes.POINTER(_After), ctypes.c_int]
    return native(Path(__file__).with_suffix(".cpp"), {"depthwise_int8": argtypes}, _is_right)


def _is_right(functions: Any) -> bool:
    """One small convolution."""
    x = (torch.arange(16 * 25) * 37 % 256 - 128).view(1, 16, 5, 5)
    codes = torch.arange(16 * 9) * 29 % 256 - 128
    window = Window(3, 3, top=1, bottom=1, left=1, right=1, groups=16)
    scale, bias, x_scale = torch.linspace(1e-3, 2e-3, 16), torch.linspace(-1, 1, 16), torch.tensor([0.3])
    fixed = codes.to(torch.int8).view(16, 9), 2, window, 5, scale, x_scale, bias
    got = Depthwise(functions, *fixed, (None, None, None), "relu")(x.to(torch.int8))
    sums = conv2d((x - 5).double(), codes.double().view(16, 1, 3, 3), padding=1, groups=16).permute(0, 2, 3, 1)
    return torch.equal(got, (sums.float() * scale * x_scale + bias).relu())
