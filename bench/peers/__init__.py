"""Collects other providers of our ops, which the benchmarks time beside them: adapters by the name of the op.

An adapter takes the arguments of the op. The product knows none of them: a competitor is added here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.peers import adder, fake_quant, observe, qconv2d, qmatmul
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.runtime.opspec import Case


def peers(op: str) -> dict[str, Callable[..., Any]]:
    """Returns the providers of an op that can run here, by name; an empty dict for an op that has none."""
    if op == "qmatmul":
        return qmatmul.providers()
    by_op: dict[str, dict[str, Callable[..., Any]]] = {
        "adder_conv2d": {"cdist": adder.cdist_conv2d},
        "adder_linear": {"cdist": adder.cdist_linear},
        "fake_quant": {"torch_fake_quantize": fake_quant.fake_quantize, "torch_learnable": fake_quant.learnable},
        "minmax": {"torch_aminmax": observe.aminmax},
        "qmatmul_fp8": {"float_linear": qmatmul.float_linear, "scaled_mm": qmatmul.scaled_mm},
        "qconv2d": {"float_conv2d": qconv2d.float_conv2d},
    }
    return by_op.get(op, {})


def absent(op: str) -> dict[str, str]:
    """Returns the providers of an op that are known and cannot run here, each with the reason."""
    return qmatmul.absent() if op == "qmatmul" else {}


def own_bytes(op: str, provider: str, case: Case, nbytes: int) -> int:
    """Returns the bytes that a provider must move for a call of which ours moves `nbytes`; 0 where they are not known.

    A library holds a packed weight in a form of its own. Where there is none, all move the same operands.
    """
    weights = [a for a in case.args if isinstance(a, PackedWeight)]
    if not weights or provider in ("ours", "torch", "compile"):
        return nbytes
    if provider not in ("float_linear", "float_conv2d"):
        return 0
    (weight,) = weights
    held = sum(t.nbytes for t in (weight.codes, weight.scale, weight.zero) if isinstance(t, Tensor))
    return nbytes - held + math.prod(weight.shape) * case.args[0].itemsize
