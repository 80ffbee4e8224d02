"""Lists the activations that products and convolutions apply to their result, by name.

A new one is an entry here, a branch of `activate` in gs_kernels/triton_lib.py and, if C++ is to have it, a number in
gs_kernels/qconv2d/cpu/int8.h; tests compare all of them. Captured graphs, patterns and converted layers
recognize it by its `module` and `calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """Describes an elementwise function y = f(z).

    Args:
        function: y of z, in the dtype of z.
        gradient: dz of z and dy, in the dtype of dy; it can be differentiated again.
        in_place: y of z, written over z where that can be done without a second tensor; else as `function`.
        module: the class of torch.nn that computes it; None if there is none.
        calls: the operators of ATen that compute it; those of relu6 do so with the limits 0 and 6 alone.
        cpp: the number it has in the C++ of qconv2d_int8 and requantize; None if that does not have it.
    """

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    module: type[nn.Module] | None = None
    calls: tuple[Any, ...] = ()
    cpp: int | None = None


def _same(y: Tensor) -> Tensor:
    return y


def _hardswish(z: Tensor) -> Tensor:
    v = z.float()
    return (v * (v + 3).clamp(0, 6) * (1 / 6)).to(z.dtype)  # libraries differ in whether they divide


def _hardswish_gradient(z: Tensor, dy: Tensor) -> Tensor:
    v = z.float()
    slope = torch.where(v < -3, 0.0, torch.where(v <= 3, v / 3 + 0.5, 1.0))
    return (dy * slope).to(dy.dtype)


def _silu_gradient(z: Tensor, dy: Tensor) -> Tensor:
    v = z.float()
    s = torch.sigmoid(v)  # not silu_backward: that has no gradient of its own
    return (dy * (s * (1 + v * (1 - s)))).to(dy.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(_same, lambda z, dy: dy, _same, cpp=0),
    "relu": Activation(
        torch.relu,
        lambda z, dy: torch.where(z > 0, dy, 0.0),
        torch.relu_,
        nn.ReLU,
        (aten.relu.default, aten.relu_.default),
        cpp=1,
    ),
    "relu6": Activation(
        F.relu6,
        lambda z, dy: torch.where((z > 0) & (z < 6), dy, 0.0),
        partial(F.relu6, inplace=True),
        nn.ReLU6,
        (aten.hardtanh.default, aten.hardtanh_.default),
        cpp=2,
    ),
    "hardswish": Activation(
        _hardswish,
        _hardswish_gradient,
        _hardswish,
        nn.Hardswish,
        (aten.hardswish.default, aten.hardswish_.default),
        cpp=3,
    ),
    "gelu": Activation(F.gelu, lambda z, dy: aten.gelu_backward(dy, z), F.gelu, nn.GELU, (aten.gelu.default,)),
    "silu": Activation(
        F.silu, _silu_gradient, partial(F.silu, inplace=True), nn.SiLU, (aten.silu.default, aten.silu_.default)
    ),
}
