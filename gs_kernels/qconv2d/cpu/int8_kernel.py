"""Calls `int8.cpp` and `depthwise_int8.cpp`: convolutions of 8-bit images, from codes to codes or fp32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.cpu.library import load_functions
from gs_kernels.program.recording import CONVOLVE, DEPTHWISE, KernelCall, recording
from gs_kernels.qconv2d.cpu.int8_weight import Int8Weight, Panels, make_panels, make_planes
from gs_kernels.qconv2d.geometry import ConvGeometry

PARALLEL_FROM = 1 << 17  # products, from which a second thread pays: measured
PARALLEL_DEPTHWISE = 1 << 15

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, size) for name in ("batch", "h", "w", "channels", "p", "q", "outputs", "groups")),
        *((name, size) for name in ("r", "s", "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w")),
        *((name, pointer) for name in ("weight", "runs")),
        *((name, size) for name in ("run_count", "words", "form", "joined", "shift", "parts")),
        *((name, pointer) for name in ("scale", "bias", "code_sums", "zero2", "fraction")),
        *((name, single) for name in ("inverse", "out_fraction", "whole", "least", "largest")),
        *((name, number) for name in ("twice", "activation", "codes", "finite")),
    ]


class _Run(ctypes.Structure):
    _fields_ = [(name, size) for name in ("r", "s", "c", "length", "words", "ends")]


ARGUMENTS = (ctypes.POINTER(_Convolution), *[pointer] * 2, size, *[pointer] * 4, ctypes.c_int)
FUNCTIONS: dict[str, Sequence[Any]] = {"convolve_int8": ARGUMENTS, "depthwise_int8": ARGUMENTS}


class Kernel:
    """Holds a weight and what follows its sums as the C++ takes them; `at` makes the function of images of one shape.

    Args:
        weight: its tensors are held, or copies.
        panels: of the weight, as `make_panels` gives them, or `make_planes` for a depthwise convolution.
        shift: the zero point of x.
        grid: of y: inverse of the scale, fraction and whole part of the zero point, least and largest code; None: fp32.
        activation: one that the C++ has.
        functions: the library, default `kernels()`.
    """

    def __init__(
        self,
        weight: Int8Weight,
        panels: Panels,
        geometry: ConvGeometry,
        shift: int,
        bias: Tensor | None,
        grid: Sequence[float] | None,
        activation: str,
        functions: Any = None,
    ) -> None:
        functions = kernels() if functions is None else functions
        self.depthwise = not len(panels.runs)
        self.run = functions.depthwise_int8 if self.depthwise else functions.convolve_int8
        self.geometry, self.outputs = geometry, weight.codes.shape[0]
        self.channels = weight.codes.shape[1] // geometry.taps * geometry.groups
        self.dtype = torch.float32 if grid is None else torch.int8

        def by_part(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if t is None else t.t().to(dtype).contiguous()

        self.held = (
            panels.words,
            panels.runs,
            by_part(weight.scale, torch.float32),
            None if bias is None else bias.float().contiguous(),
            panels.code_sums,
            by_part(weight.zero2, torch.int32),
            by_part(weight.fraction, torch.float32),
        )
        pointers = [None if t is None else t.data_ptr() for t in self.held]
        runs = len(panels.runs), panels.words.shape[2], panels.form, panels.joined
        finite = grid is not None and bool(weight.scale.isfinite().all())
        finite = finite and (bias is None or bool(bias.isfinite().all()))
        self.tail = (
            *pointers[:2],
            *(*runs, shift, weight.scale.shape[1]),
            *pointers[2:],
            *((0.0,) * 5 if grid is None else grid),
            *(weight.twice, ACTIVATIONS[activation].cpp, grid is not None, finite),
        )

    def at(self, b: int, h: int, w: int, rows: bool = False) -> Callable[..., Tensor]:
        """Returns the function of int8 images `[b, C, h, w]`, channels-last, and of what is added.

        Its arguments: x; its scale, `[1]` or one for each pixel of y, and 0 or 1 for that; a residual, int8 or fp32,
        channels-last, or None; scale and zero point, `[1]`, of an int8 residual. It returns `[b, O, P, Q]`,
        channels-last; rows: the same as `[b * P * Q, O]`.
        """
        geometry, (p, q) = self.geometry, self.geometry.output(h, w)
        like = _without_memory((b * p * q, self.outputs) if rows else (b, self.outputs, p, q), self.dtype)
        filters = (geometry.r, geometry.s, *geometry.stride, geometry.top, geometry.left, *geometry.dilation)
        struct = _Convolution(b, h, w, self.channels, p, q, self.outputs, geometry.groups, *filters, *self.tail)
        products = b * p * q * self.outputs * geometry.taps * (self.channels // geometry.groups)
        parallel = products >= (PARALLEL_DEPTHWISE if self.depthwise else PARALLEL_FROM)
        # the struct points to `held`
        run, plan, held = self.run, ctypes.pointer(struct), self.held
        empty_like, get_num_threads = torch.empty_like, torch.get_num_threads
        name = DEPTHWISE if self.depthwise else CONVOLVE

        def convolve(
            x: Tensor,
            x_scale: Tensor,
            step: int = 0,
            residual: Tensor | None = None,
            scale: Tensor | None = None,
            zero: Tensor | None = None,
            *,
            held: tuple[Tensor | None, ...] = held,
        ) -> Tensor:
            y = empty_like(like)
            threads = get_num_threads() if parallel else 1
            if residual is None:
                run(plan, x.data_ptr(), x_scale.data_ptr(), step, y.data_ptr(), None, None, None, threads)
            else:
                grid = None if scale is None else scale.data_ptr(), None if zero is None else zero.data_ptr()
                added = residual.data_ptr(), *grid
                run(plan, x.data_ptr(), x_scale.data_ptr(), step, y.data_ptr(), *added, threads)
            if recording.calls is not None and not step:
                constants = x_scale, scale, zero
                recording.calls.append(KernelCall(name, struct, held, x, y, residual, constants, parallel))
            return y

        return convolve


def _without_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Makes rows, or channels-last images, that `torch.empty_like` takes: that is half the time of `torch.empty`."""
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    like = torch.empty(shape, dtype=dtype, device="cpu", memory_format=form)
    like.untyped_storage().resize_(0)
    return like


@cache
def kernels() -> Any:
    """Returns the library, or None if its 8-bit convolutions do not run here; the log says why."""
    return load_functions("8-bit convolutions", FUNCTIONS, self_test, (_Convolution, _Run))


def forms_of(functions: Any) -> int:
    """Returns the forms of products that a library has, as bits."""
    return ctypes.c_int64.in_dll(functions, "int8_forms").value


def self_test(functions: Any) -> bool:
    """Checks small convolutions in every form of products, with all that may follow, and a depthwise one."""
    x = (torch.arange(2 * 5 * 6 * 7) * 37 % 256 - 128).view(2, 5, 6, 7)
    geometry = ConvGeometry(3, 3, 2, 1, top=1, bottom=1, left=1, right=1)
    scale, bias, x_scale = torch.linspace(1e-3, 2e-3, 20)[:, None], torch.linspace(-1, 1, 20), torch.tensor([0.25])
    image, results = x.to(torch.int8).contiguous(memory_format=torch.channels_last), []
    for largest, form in ((127, 0), (7, 1), (30, 1), (60, 1), (127, 2)):
        if not forms_of(functions) >> form & 1:
            continue
        codes = torch.arange(20 * 45).view(20, 45) * 29 % (2 * largest + 1) - largest
        weight = Int8Weight(codes.to(torch.int8), 2, None, None, 45, scale)
        panels = make_panels(weight, geometry, 1 << form)
        kernel = Kernel(weight, panels, geometry, 5, bias, None, "relu", functions)
        filters = codes.view(20, 3, 3, 5).permute(0, 3, 1, 2).double()
        sums = conv2d((x - 5).double(), filters, stride=(2, 1), padding=1).permute(0, 2, 3, 1)
        want = (sums.float() * scale[:, 0] * x_scale + bias).relu().permute(0, 3, 1, 2)
        results.append(torch.equal(kernel.at(2, 6, 7)(image, x_scale), want))
    taps = torch.arange(5 * 9).view(5, 9) * 29 % 255 - 127
    weight = Int8Weight(taps.to(torch.int8), 2, None, None, 9, scale[:5])
    each = ConvGeometry(3, 3, 2, 1, top=1, bottom=1, left=1, right=1, groups=5)
    planes = make_planes(weight, each, forms_of(functions))
    kernel = Kernel(weight, planes, each, 5, None, (4.0, 0.25, -3.0, -100.0, 90.0), "none", functions)
    sums = conv2d((x - 5).double(), taps.view(5, 1, 3, 3).double(), stride=(2, 1), padding=1, groups=5)
    codes = (sums.float() * scale[:5, :, None] * x_scale * 4.0 + 0.25).round() - 3
    results.append(torch.equal(kernel.at(2, 6, 7)(image, x_scale), codes.clamp(-100, 90).to(torch.int8)))
    return all(results)
