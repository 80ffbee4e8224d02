"""Checks packed weights before anything reads them. Looks at metadata only, but for `check_packed_values`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gs_kernels.formats import E2M1
from gs_kernels.pack.layouts import BITS, CANONICAL, LAYOUTS, PackedWeight, codes_dtype, codes_shape
from gs_kernels.runtime.torch_private import PLAIN

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALES_8 = (torch.float8_e8m0fnu, torch.float8_e4m3fn)  # of weights with levels
CHECKED = "_checked"  # attribute of a weight: its form when it was right; no field, so that a changed copy has none


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_bits(who: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{who}: bits must be one of {', '.join(map(str, BITS))}, got {bits}")


def check_layout(who: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"{who}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def check_group(who: str, k: int, group_size: int) -> None:
    if group_size < 1 or k % group_size != 0:
        hint = f"; pad K or use group_size={math.gcd(k, group_size)}" if group_size >= 1 else ""
        raise ValueError(f"{who}: K must be a multiple of group_size, got K={k}, group_size={group_size}{hint}")


def check_tensor(who: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(f"{who}: {name} must be {' / '.join(map(dtype_name, dtypes))}, got {dtype_name(t.dtype)}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{who}: {name} must have shape {list(shape)}, got {list(t.shape)}")


def check_packed_codes(
    who: str, codes: Tensor, bits: int, shape: tuple[int, int], layout: str, name: str = "codes"
) -> None:
    check_bits(who, bits)
    check_layout(who, layout)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{who}: shape must be (N, K) with N, K >= 1, got {tuple(shape)}")
    want = codes_shape(layout, shape[0], shape[1], bits)
    if isinstance(codes, Tensor) and codes.dtype == codes_dtype(layout) and tuple(codes.shape) != want:
        have, need = codes.numel() * codes.element_size(), math.prod(want) * codes.element_size()
        size = f"truncated: {have} of {need} bytes" if have < need else f"{have} bytes where {need} belong"
        raise ValueError(
            f"{who}: {name} must have shape {list(want)} for [{shape[0]}, {shape[1]}] in {bits} bits, {layout},"
            f" got {list(codes.shape)} ({size})"
        )
    check_tensor(who, name, codes, (codes_dtype(layout),), want)


def check_packed(who: str, weight: PackedWeight, name: str = "weight") -> None:
    """Raises unless the tensors of the weight fit together. Reads no values, so it costs no synchronization.

    A weight that was right is only compared with what it was then: its tensors may have been changed in place.

    Raises:
        TypeError: if a part is of the wrong kind or dtype.
        ValueError: if a shape, a device, the bits, the group size or the layout does not fit.
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{who}: {name} must be a PackedWeight, got {type(weight).__name__}; use pack_weight")
    if torch.compiler.is_compiling():
        _check_parts(who, weight, name)
    elif weight.__dict__.get(CHECKED) is None or weight.__dict__[CHECKED] != _form(weight):
        _check_parts(who, weight, name)
        # the sizes of other tensors may be symbols of a trace
        if all(type(t) in PLAIN for t in vars(weight).values() if isinstance(t, Tensor)):
            weight.__dict__[CHECKED] = _form(weight)


def _form(weight: PackedWeight) -> tuple[Any, ...]:
    """Gives what the checks look at that can change: of each tensor its shape, dtype and device."""
    codes, scale, zero = weight.codes, weight.scale, weight.zero
    form: tuple[Any, ...] = (codes.shape, codes.dtype, codes.device, scale.shape, scale.dtype, scale.device)
    if isinstance(zero, Tensor):
        form += (zero.shape, zero.dtype, zero.device)
    for t in (weight.levels, weight.divisor):
        form += (None,) if t is None else (t.shape, t.dtype, t.device)
    return form


def _check_parts(who: str, weight: PackedWeight, name: str) -> None:
    check_packed_codes(who, weight.codes, weight.bits, weight.shape, weight.layout, f"{name}.codes")
    n, k = weight.shape
    check_group(f"{who}: {name}", k, weight.group_size)
    grouped = (n, k // weight.group_size)
    dtypes = FLOATS if weight.levels is None else (*FLOATS, *SCALES_8)
    check_tensor(who, f"{name}.scale", weight.scale, dtypes, grouped)
    if isinstance(weight.zero, Tensor):
        check_tensor(who, f"{name}.zero", weight.zero, FLOATS, grouped)
    elif isinstance(weight.zero, bool) or not isinstance(weight.zero, int | float):
        raise TypeError(f"{who}: {name}.zero must be a tensor or a number, got {type(weight.zero).__name__}")
    elif not -math.inf < weight.zero < math.inf:  # as math.isfinite, which compilers cannot trace
        raise ValueError(f"{who}: {name}.zero must be finite, got {weight.zero}")
    if weight.levels is not None:
        check_tensor(who, f"{name}.levels", weight.levels, (torch.float32,), (2**weight.bits,))
        if isinstance(weight.zero, Tensor) or weight.zero != 0:
            got = "a tensor" if isinstance(weight.zero, Tensor) else weight.zero
            raise ValueError(f"{who}: {name}.zero must be 0 with levels, got {got}; subtract it from the levels")
    _check_divisor(who, weight, name)
    for part in ("scale", "zero", "levels", "divisor"):
        t = getattr(weight, part)
        if isinstance(t, Tensor) and t.device != weight.codes.device:
            raise ValueError(
                f"{who}: {name}.{part} must be on the device of the codes, {weight.codes.device}, got {t.device};"
                f" use weight.to(device)"
            )


def _check_divisor(who: str, weight: PackedWeight, name: str) -> None:
    divisor, n = weight.divisor, weight.shape[0]
    if (divisor is not None) != (weight.scale.dtype == torch.float8_e4m3fn):
        got = "none" if divisor is None else f"one beside {dtype_name(weight.scale.dtype)}"
        raise ValueError(f"{who}: {name}.divisor must come with scales of float8_e4m3fn and no others, got {got}")
    if divisor is not None:
        rows = tuple(divisor.shape) if isinstance(divisor, Tensor) else ()
        if len(rows) != 1 or rows[0] < 1 or n % rows[0]:
            raise ValueError(f"{who}: {name}.divisor must be [D], D a divisor of the {n} rows, got {list(rows)}")
        check_tensor(who, f"{name}.divisor", divisor, (torch.float32,), rows)


def check_e2m1(who: str, weight: PackedWeight, name: str = "weight") -> None:
    """Raises unless the levels beside scales of 8 bits are those of 4-bit floats, which kernels compute. Reads values.

    Raises:
        ValueError: so.
    """
    if weight.scale.dtype in SCALES_8 and weight.levels is not None and weight.levels.tolist() != list(E2M1):
        raise ValueError(
            f"{who}: {name}.levels must be those of e2m1 beside scales of {dtype_name(weight.scale.dtype)}, got "
            f"{weight.levels.tolist()}; use float scales for other levels"
        )


def check_packed_values(who: str, weight: PackedWeight, name: str = "weight") -> None:
    """Raises if a scale, zero point, level or divisor is NaN or infinite, or a canonical row has bits behind its end.

    Reads values: for load time. Negative scales are allowed: some methods fold a sign into them.
    """
    for part in ("scale", "zero", "levels", "divisor"):
        t = getattr(weight, part)
        t = t.float() if isinstance(t, Tensor) and t.dtype in SCALES_8 else t  # which have no isfinite
        if isinstance(t, Tensor) and not bool(torch.isfinite(t).all()):
            at = (~torch.isfinite(t)).nonzero()[0].tolist()
            raise ValueError(
                f"{who}: {name}.{part} must be finite, got {float(t[tuple(at)])} at {at};"
                f" the file is damaged or the weight was calibrated on such values"
            )
    check_e2m1(who, weight, name)
    if weight.divisor is not None and not bool((weight.divisor > 0).all()):
        raise ValueError(f"{who}: {name}.divisor must be above 0, got {float(weight.divisor.min())}")
    used = weight.shape[1] * weight.bits % 8
    if weight.layout == CANONICAL and used and bool((weight.codes[:, -1] >> used).any()):
        row = int((weight.codes[:, -1] >> used).nonzero()[0, 0])
        raise ValueError(
            f"{who}: {name}.codes must be 0 behind the last of {weight.shape[1]} codes, got last byte"
            f" {int(weight.codes[row, -1])} in row {row}; bits or shape are not those that it was packed with"
        )
