"""Lists launches of packed convolutions for the AOT gate, with the bounds that their machine code has to keep."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PLANAR, PackedWeight
from gs_kernels.qconv2d.geometry import make_geometry
from gs_kernels.qconv2d.tiles import choose_plan, depthwise_tile
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.opspec import AotCase

ELSEWHERE = ("sm_80", "sm_100", "gfx942")
HOPPER = ("sm_90",)


def _meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    t = torch.empty(sizes, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else t


def conv(
    bits: int,
    c: int,
    o: int,
    size: int,
    kernel: int,
    *,
    batch: int = 32,
    stride: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    x_zero: bool = False,
    group: int = 0,
    **bounds: Any,
) -> AotCase:
    """Launches a layer of a network with one scale per channel; of int8 x, residual and result are codes."""
    geometry = make_geometry("gate", kernel, stride, kernel // 2, 1, groups)
    k, whole = kernel * kernel * c // groups, dtype == torch.int8
    p, q = geometry.output(size, size)

    def plan_for(sm: int, sm_count: int) -> Plan:
        options: dict[str, Any] = {"x_bits": 8 * dtype.itemsize, "levels": False, "sm": sm, "sm_count": sm_count}
        options |= {"channels": c // groups, "int8_group": group, "splits": False}
        return choose_plan(batch * p * q, o // groups, k, groups, **options)

    def run() -> None:
        kernels = importlib.import_module("gs_kernels.qconv2d.kernel")
        x, y = _meta(batch, c, size, size, dtype=dtype), _meta(batch, o, p, q, dtype=dtype)
        asm, sm, sm_count = kernels.device_of(x)
        scale = _meta(o, k // group if group else 1, dtype=torch.float32)
        zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
        packed = _meta(-(-k // 128), o, 8 * bits, dtype=torch.int16)
        weight = PackedWeight(packed, scale, zero, None, bits, (o, k), group or k, PLANAR)
        bias, one = _meta(o, dtype=torch.float32), _meta(1, dtype=torch.float32)
        requant = (y, one, one, one, one) if whole else (y, None, None, None, None)
        codes = (one, one if x_zero else None) if whole else (None, None)
        sums = _meta(*scale.shape, dtype=torch.int32) if x_zero else None
        tail = (geometry, "relu", plan_for(sm, sm_count), asm)
        if c == groups:
            kernels.convolve_depthwise(y, x, *codes, weight, bias, requant, geometry, "relu")
        elif whole:
            kernels.convolve_int8(y, x, *codes, sums, weight, bias, requant, *tail)
        else:
            kernels.convolve(y, x, weight, bias, y, *tail)

    elements = math.prod(depthwise_tile(o)[:2]) if c == groups else 128 * plan_for(90, 132).block_n
    name = f"w{bits}-{c}to{o}-{size}-k{kernel}s{stride}g{groups}-b{batch}{'-zero' if x_zero else ''}"
    name += f"-g{group}" if group else ""
    return AotCase(
        f"{name}-{str(dtype).removeprefix('torch.')}", run, elements=elements, **({"max_regs": 255} | bounds)
    )


def _regimes(dtypes: tuple[torch.dtype, ...], every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, bits, c, o, size, zero in itertools.product(
        dtypes[: 3 if every else 1],
        (4, 8, 2, 1)[: 4 if every else 2],
        (128, 3, 64)[: 3 if every else 2],
        (256, 64)[: 2 if every else 1],
        ((4, 1), (28, 32), (8, 4), (14, 8))[: 4 if every else 2],
        ("middle", "points")[: 2 if every else 1],
    ):

        def run(
            dtype: Any = dtype, bits: int = bits, c: int = c, o: int = o, size: Any = size, zero: str = zero
        ) -> Any:
            kernels = importlib.import_module("gs_kernels.qconv2d.kernel")
            x, geometry = _meta(size[1], c, size[0], size[0], dtype=dtype), make_geometry("gate", 3, 1, 1, 1, 1)
            group, k = (32 if zero == "points" and c % 32 == 0 else 9 * c), 9 * c
            scale = _meta(o, k // group, dtype=torch.float32)
            point = scale if zero == "points" else 0.5 if bits == 1 else 2.0 ** (bits - 1)
            codes = _meta(-(-k // 128), o, 8 * bits, dtype=torch.int16)
            weight = PackedWeight(codes, scale, point, None, bits, (o, k), group, PLANAR)
            if dtype != torch.int8:
                return kernels.qconv2d_triton(x, weight, None, None, geometry, "relu", False)
            one, sums = _meta(1, dtype=torch.float32), _meta(*scale.shape, dtype=torch.int32)
            tail = (one, sums, None, None, None, one, one, "relu", torch.bfloat16, False)
            return kernels.qconv2d_int8_triton(x, one, weight, None, geometry, *tail)

        name = f"w{bits}-{c}to{o}-{size[0]}-b{size[1]}-{zero}"
        yield f"{name}-{str(dtype).removeprefix('torch.')}", run


def regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields convolutions of float images: of each dtype, width, kind of channels and number of pixels."""
    return _regimes((torch.bfloat16, torch.float32, torch.float16), every)


def int8_regimes(every: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields convolutions of images of codes: of each width, kind of channels and number of pixels."""
    return _regimes((torch.int8,), every)


def reduce(m: int, **bounds: Any) -> AotCase:
    """Adds four partial sums of a convolution with 1024 channels, then the epilogue."""

    def run() -> Any:
        kernel = importlib.import_module("gs_kernels.triton_epilogue")
        x_scale, bias = _meta(m, dtype=torch.float32), _meta(1024, dtype=torch.float32)
        partials = _meta(4, m, 1024, dtype=torch.float32)
        return kernel.reduce_partials(_meta(m, 1024), partials, bias, "relu", x_scale=x_scale, stride_xs=1)

    return AotCase(f"reduce-m{m}", run, elements=512, **bounds)


# as products with packed weights (gs_kernels/qmatmul/aot_cases.py), and half an instruction a weight to gather pixels;
# with 64 channels twice that, for half as many weights share a gather
MORE: dict[str, Any] = {"mma": "HGMMA", "max_shared_stores": 4, "overlapped": True, "targets": HOPPER}
WHOLE: dict[str, Any] = {"mma": "IGMMA", "max_shared_stores": 4, "targets": HOPPER}

QCONV2D = (
    conv(4, 64, 64, 56, 3, max_instructions=5.7, **MORE),
    conv(4, 128, 128, 28, 3, max_instructions=4.6, **MORE),
    conv(4, 128, 128, 28, 3, dtype=torch.float16, max_instructions=4.8, **MORE),
    conv(2, 128, 128, 28, 3, max_instructions=4.5, **MORE),
    conv(1, 128, 128, 28, 3, max_instructions=4.5, **MORE),
    conv(8, 128, 128, 28, 3, max_instructions=4.7, **MORE),
    conv(4, 256, 1024, 14, 1, max_instructions=3.6, **MORE),
    conv(4, 512, 512, 7, 3, batch=1, max_instructions=3.0, **MORE),
    conv(4, 24, 144, 56, 1, mma="HGMMA", targets=HOPPER),
    conv(4, 96, 24, 56, 1, mma="HGMMA", targets=HOPPER),
    conv(4, 3, 64, 32, 7, batch=1, stride=2, mma="HGMMA", wide_loads=False, targets=HOPPER),
    conv(4, 256, 256, 14, 3, groups=32, mma="HGMMA", targets=HOPPER),
    conv(4, 64, 64, 7, 3, batch=1, dtype=torch.float32, targets=HOPPER),
    conv(8, 192, 192, 28, 3, groups=192, wide_loads=False, targets=("sm_90", "gfx942")),
    conv(4, 128, 128, 28, 3, targets=ELSEWHERE),
)
INT8 = (
    conv(8, 128, 128, 28, 3, dtype=torch.int8, max_instructions=2.5, **WHOLE),
    conv(4, 128, 128, 28, 3, dtype=torch.int8, x_zero=True, max_instructions=2.3, **WHOLE),
    conv(2, 256, 1024, 14, 1, dtype=torch.int8, x_zero=True, max_instructions=1.8, **WHOLE),
    conv(1, 64, 64, 56, 3, dtype=torch.int8, max_instructions=3.7, **WHOLE),
    conv(8, 24, 144, 56, 1, dtype=torch.int8, x_zero=True, wide_loads=False, mma="IGMMA", targets=HOPPER),
    conv(8, 512, 512, 7, 3, batch=1, dtype=torch.int8, max_instructions=1.6, **WHOLE),
    conv(4, 128, 128, 28, 3, dtype=torch.int8, group=32, targets=HOPPER),
    conv(8, 192, 192, 28, 3, groups=192, dtype=torch.int8, wide_loads=False, targets=("sm_90", "gfx942")),
    conv(8, 128, 128, 28, 3, dtype=torch.int8, targets=ELSEWHERE),
    reduce(1, max_regs=40, max_instructions=24, targets=("sm_80", "sm_90", "gfx942")),
    reduce(16, max_regs=40, max_instructions=30, wide_loads=False, targets=("sm_90", "gfx942")),
)
