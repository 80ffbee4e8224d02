"""Calls `cpu.cpp`: fake-quant, its gradient, codes, values and ranges, each in one pass over memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gs_kernels.cpu.library import FLOATS, load_functions
from gs_kernels.fake_quant.as_ops import plain_backward, plain_dequantize, plain_fake_quant, plain_quantize
from gs_kernels.fake_quant.strided_rows import BY_ROW, Rows, like, readable, same_layout

PARALLEL_FROM = 1 << 15  # elements, from which a second thread pays

size, single, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, size) for name in ("by", "rows", "cols", "channels", "per", "outer", "inner")),
        *((name, pointer) for name in ("scale", "zero")),
        *((name, single) for name in ("qmin", "qmax")),
        *((name, number) for name in ("floats", "is_signed", "threads")),
    ]


FUNCTIONS: dict[str, Sequence[Any]] = {
    "fake_quantize": (ctypes.POINTER(_Pass), *[pointer] * 4),
    "fake_quantize_backward": (ctypes.POINTER(_Pass), *[pointer] * 5),
    "quantize_floats": (ctypes.POINTER(_Pass), *[pointer] * 2),
    "dequantize_codes": (ctypes.POINTER(_Pass), *[pointer] * 3),
    "find_ranges": (ctypes.POINTER(_Pass), *[pointer] * 3),
}


def fake_quant_cpu(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    functions = kernels()
    if functions is None:
        return _plain(plain_fake_quant, x, scale, zero, qmin, qmax, axis, group)
    source, rows = readable(x, axis, group)
    y = torch.empty_like(source)
    scale, zero = scale.contiguous(), zero.contiguous()
    params = _pass(rows, scale, zero, x.dtype, qmin, qmax)
    functions.fake_quantize(params, source.data_ptr(), y.data_ptr(), None, None)
    return y if source is x else like(y, x)


def fake_quant_with_range(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Fake-quantizes by tensor and finds the range of x on the way; None if the C++ does not run."""
    functions = kernels()
    if functions is None:
        return None
    source, rows = readable(x, -1, 0)
    y = torch.empty_like(source)
    low, high = (x.new_empty(1, dtype=torch.float32) for _ in range(2))
    scale, zero = scale.contiguous(), zero.contiguous()
    params = _pass(rows, scale, zero, x.dtype, qmin, qmax)
    functions.fake_quantize(params, source.data_ptr(), y.data_ptr(), low.data_ptr(), high.data_ptr())
    return y if source is x else like(y, x), low, high


def fake_quant_backward_cpu(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    for_scale: bool,
    for_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    functions = kernels()
    if functions is None:
        return _plain(plain_backward, dy, x, scale, zero, qmin, qmax, axis, group, for_scale, for_zero)  # type: ignore[no-any-return]
    source, rows = readable(x, axis, group)
    dx = torch.empty_like(source)
    if dy.dtype != x.dtype or not same_layout(dy, dx):
        dy = torch.empty_like(dx).copy_(dy)
    dscale, dzero = (scale.new_empty(len(scale) if wanted else 0) for wanted in (for_scale, for_zero))
    scale, zero = scale.contiguous(), zero.contiguous()
    functions.fake_quantize_backward(
        _pass(rows, scale, zero, x.dtype, qmin, qmax),
        *(dy.data_ptr(), source.data_ptr(), dx.data_ptr()),
        *(sums.data_ptr() if wanted else None for sums, wanted in ((dscale, for_scale), (dzero, for_zero))),
    )
    return dx if source is x else like(dx, x), dscale, dzero


def quantize_cpu(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    functions = kernels()
    if functions is None:
        return _plain(plain_quantize, x, scale, zero, qmin, qmax, axis, group)
    source, rows = readable(x, axis, group)
    codes = torch.empty_like(source, dtype=torch.int8 if qmin < 0 else torch.uint8)
    scale, zero = scale.contiguous(), zero.contiguous()
    params = _pass(rows, scale, zero, x.dtype, qmin, qmax, codes.dtype)
    functions.quantize_floats(params, source.data_ptr(), codes.data_ptr())
    return codes if source is x else like(codes, x)


def dequantize_cpu(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    axis: int,
    group: int,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """Computes `dequantize`; levels: fp32, what each code that there may be stands for, instead of itself."""
    functions = kernels()
    if functions is None:
        codes = codes if levels is None else levels.detach()[codes.int()]
        return _plain(plain_dequantize, codes, scale, zero, axis, group, dtype)
    source, rows = readable(codes, axis, group)
    y = torch.empty_like(source, dtype=dtype)
    scale, zero = scale.contiguous(), zero.contiguous()
    params = _pass(rows, scale, zero, dtype, 0, 0, codes.dtype)
    table = None if levels is None else levels.contiguous()
    functions.dequantize_codes(params, source.data_ptr(), None if table is None else table.data_ptr(), y.data_ptr())
    return y if source is codes else like(y, codes)


def range_cpu(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor] | None:
    """Finds the smallest and the largest of each channel, `[C]` fp32; None if the C++ does not run."""
    functions = kernels()
    if functions is None:
        return None
    source, rows = readable(x, axis, group)
    low, high = (x.new_empty(rows.channels, dtype=torch.float32) for _ in range(2))
    functions.find_ranges(_pass(rows, None, None, x.dtype, 0, 0), source.data_ptr(), low.data_ptr(), high.data_ptr())
    return low, high


def _pass(
    rows: Rows,
    scale: Tensor | None,
    zero: Tensor | None,
    floats: torch.dtype,
    qmin: int,
    qmax: int,
    codes: torch.dtype = torch.int8,
) -> _Pass:
    threads = torch.get_num_threads() if rows.rows * rows.cols >= PARALLEL_FROM else 1
    places = (None if t is None else t.data_ptr() for t in (scale, zero))
    about = (rows.by, rows.rows, rows.cols, rows.channels, rows.per, rows.outer, rows.inner)
    return _Pass(*about, *places, qmin, qmax, FLOATS[floats], codes == torch.int8, threads)


def _plain(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a reference without gradients and autocast."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return function(*args)


@cache
def kernels() -> Any:
    """Returns the library, or None if its fake-quant does not run here; the log says why."""
    return load_functions("fake-quant", FUNCTIONS, self_test, (_Pass,))


def self_test(functions: Any) -> bool:
    """Checks one small pass of each kind."""
    x, dy = torch.arange(-230, 230).view(10, 46) * 0.3, torch.arange(460).view(10, 46) * 0.5
    scale, zero = torch.arange(1, 11) * 0.25, torch.arange(10) * 0.25
    rows = Rows(BY_ROW, 10, 46, 10, 10, 0, 46)
    y, dx, back, codes = (torch.empty(10, 46, dtype=dtype) for dtype in (*[torch.float32] * 3, torch.int8))
    low, high, dscale, dzero = torch.empty(4, 10)
    params = _pass(rows, scale, zero, torch.float32, -20, 30)
    at = params, x.data_ptr()
    functions.fake_quantize(*at, y.data_ptr(), None, None)
    functions.quantize_floats(*at, codes.data_ptr())
    functions.dequantize_codes(params, codes.data_ptr(), None, back.data_ptr())
    functions.find_ranges(*at, low.data_ptr(), high.data_ptr())
    functions.fake_quantize_backward(
        params, dy.data_ptr(), x.data_ptr(), dx.data_ptr(), dscale.data_ptr(), dzero.data_ptr()
    )
    grid = scale, zero, -20, 30, 0, 0
    want = plain_backward(dy, x, *grid, True, True)
    return (
        torch.equal(y, plain_fake_quant(x, *grid))
        and torch.equal(back, y)
        and (torch.equal(low, x.amin(1)) and torch.equal(high, x.amax(1)))
        and torch.equal(dx, want[0])
        and torch.allclose(torch.stack((dscale, dzero)), torch.stack(want[1:]), rtol=1e-4)
    )
