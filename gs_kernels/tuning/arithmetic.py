"""Chooses whether a GPU multiplies 8-bit activations as integers or dequantizes both sides: by tables, else predicted.

One choice a layer, whatever the number of rows: what a row becomes must not depend on how many others there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from gs_kernels.runtime.device import capabilities
from gs_kernels.tuning.gpu_specs import Card, card_of
from gs_kernels.tuning.space import Problem, find_space
from gs_kernels.tuning.tables import Table, find_table, nearest

ROWS = 4096  # of a prediction: with many rows products decide, with few both ways read the same packed weight


@dataclass(frozen=True)
class Product:
    """Describes the product of a layer.

    Args:
        op: "qmatmul" or "qconv2d".
        n, k: channels of y, those of one group of a convolution, and products for each.
        bits: of the weight.
        x_bits: of an element of the activations as floats.
        groups: of channels of a convolution.
        channels: of x in a group of a convolution.
    """

    op: str
    n: int
    k: int
    bits: int
    x_bits: int
    groups: int = 1
    channels: int = 0


@lru_cache(maxsize=4096)
def prefers_floats(product: Product, device: torch.device) -> str | None:
    """Returns why a layer should multiply floats on a device; None if integers are as fast, or if nobody knows."""
    if device.type != "cuda":
        return None
    gpu = capabilities(torch.cuda.current_device() if device.index is None else device.index)
    return compare(product, find_table(gpu.sm, gpu.sm_count), card_of(gpu.name))


def compare(product: Product, table: Table | None, card: Card | None) -> str | None:
    """Returns why floats are faster: by what the table measured of both, else by what the card is predicted to take."""
    pairs = [] if table is None else _measured(product, table)
    if pairs:
        integers, floats = (sum(times) for times in zip(*pairs, strict=True))
        return _reason(integers, floats, "measured")
    if card is None:
        return None
    return _reason(_predicted(product, card, True), _predicted(product, card, False), f"predicted for {card.name}")


def _reason(integers: float, floats: float, how: str) -> str | None:
    return f"integers take {integers / floats:.2f} times as long, {how}" if floats < integers else None


def _measured(product: Product, table: Table) -> list[tuple[float, float]]:
    """Lists the microseconds of integers and of floats for the same problem, where the nearest entries are that."""
    if product.op == "qmatmul":
        sizes = {"n": product.n, "k": product.k}
        integers, floats = ("qmatmul_int8", sizes | {"group": 0}), ("qmatmul", sizes | {"bits": product.bits})
    else:
        sizes = {"n": product.n, "k": product.k, "groups": product.groups, "channels": product.channels}
        integers, floats = ("qconv2d", sizes | {"x_bits": 8}), ("qconv2d", sizes | {"x_bits": 16})
    by_problem = [_times(table, op, given, tuple(sizes)) for op, given in (integers, floats)]
    return [(us, by_problem[1][key]) for key, us in by_problem[0].items() if key in by_problem[1]]


def _times(table: Table, op: str, sizes: Problem, shared: tuple[str, ...]) -> dict[tuple[int, ...], float]:
    """Returns the microseconds of the nearest entries, by their rows and the sizes that both ways have."""
    space = find_space(op)
    entries = [entry for _, entry in nearest(table, space, sizes)]
    return {(e.problem[space.rows], *(e.problem[name] for name in shared)): e.us for e in entries}


def _predicted(product: Product, card: Card, integers: bool) -> float:
    """Predicts the microseconds of `ROWS` rows at the card's peaks: each operand and the result once through memory."""
    from gs_kernels.aot.trace import Call
    from gs_kernels.tuning.cost_model import predict_call

    x_bytes = 1 if integers else product.x_bits // 8
    inputs, outputs = product.groups * (product.channels or product.k), product.groups * product.n
    nbytes = ROWS * (inputs + outputs) * x_bytes + outputs * product.k * product.bits // 8
    kind = "int8" if integers else "16bit" if product.x_bits == 16 else "fp32"
    return predict_call(Call(product.op, nbytes, 2 * ROWS * outputs * product.k, kind), card).us
