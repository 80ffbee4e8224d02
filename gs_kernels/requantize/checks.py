"""Checks the arguments of requantizing. Looks at metadata only, but for `check_values`."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.fake_quant.checks import FLOATS, check_input, check_qparams, check_values
from gs_kernels.runtime.torch_private import is_eager

WHO = "requantize"


def check_operand(name: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> None:
    """Raises unless these are int8 codes with a grid."""
    who = f"{WHO}: {name}"
    check_input(who, codes, (torch.int8,))
    check_grid(name, codes, scale, zero)


def check_grid(name: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> None:
    """Raises unless scale and zero are `[1]` fp32 where the codes are and, if they can be read, usable."""
    if scale is None or zero is None:
        raise TypeError(f"{WHO}: {name}_scale and {name}_zero must both be tensors, got {scale} and {zero}")
    who = f"{WHO}: {name}"
    check_qparams(who, codes, scale, zero, 1)
    if scale.device.type == "cpu" and is_eager(codes, scale, zero):
        check_values(who, scale, zero)


def check_ends(qmin: int, qmax: int, activation: str, dtype: torch.dtype) -> None:
    """Raises unless codes end at qmin and qmax, and the activation and dtype are known."""
    if not -128 <= qmin < qmax <= 127:
        raise ValueError(f"{WHO}: -128 <= qmin < qmax <= 127 must hold, got qmin={qmin}, qmax={qmax}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{WHO}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{WHO}: dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")
