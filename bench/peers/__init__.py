"""Other providers of our ops, which the benchmarks time beside them: adapters by the name of the op.

An adapter takes the arguments of the op. The product knows none of them: a competitor is added here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.peers import fake_quant, observe, qconv2d, qmatmul


def peers(op: str) -> dict[str, Callable[..., Any]]:
    """Returns the providers of an op that can run here, by name; an empty dict for an op that has none."""
    if op == "qmatmul":
        return qmatmul.providers()
    known: dict[str, dict[str, Callable[..., Any]]] = {
        "fake_quant": {"torch_fake_quantize": fake_quant.fake_quantize, "torch_learnable": fake_quant.learnable},
        "minmax": {"torch_aminmax": observe.aminmax},
        "qmatmul_fp8": {"float_linear": qmatmul.float_linear},
        "qconv2d": {"float_conv2d": qconv2d.float_conv2d},
    }
    return known.get(op, {})


def absent(op: str) -> dict[str, str]:
    """Returns the providers of an op that are known and cannot run here, each with the reason."""
    return qmatmul.absent() if op == "qmatmul" else {}
