"""Describes GPUs by their makers' data sheets: what the cost model divides bytes, products and instructions by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from gs_kernels.aot.targets import PARTITIONS
from gs_kernels.runtime import bound_calls
from gs_kernels.runtime.device import capabilities


@dataclass(frozen=True)
class Card:
    """Describes one GPU.

    target: a name of `gs_kernels.aot.TARGETS`. bandwidth: of its memory, GB/s. clock: highest of its SMs, GHz.

    peaks: TFLOP/s (or TOP/s) of dense products, by the kind of operands that `Work.flops` names.
    l2_bytes: of its L2 cache. port: bytes a clock that an SM gets from it. l2_bandwidth: GB/s that all get.
    launch_us: from the start of a kernel in a CUDA graph to its first instruction. early_us: from the end of the kernel
    before it to the first instruction that waited for that. latency_us: of memory under load. These and l2_bandwidth
    are round numbers, of no data sheet; published microbenchmarks of L2 reach 36 to 39 bytes a clock and SM on Hopper.
    """

    name: str
    target: str
    sm_count: int
    clock: float
    bandwidth: float
    peaks: dict[str, float] = field(hash=False)
    l2_bytes: int
    l2_bandwidth: float
    source: str
    port: float = 64.0
    launch_us: float = 2.0
    early_us: float = 1.0
    latency_us: float = 0.7

    @property
    def sm(self) -> int:
        """Returns the compute capability of its target, 90 for 9.0."""
        return int(self.target.removeprefix("sm_"))

    @property
    def issue_rate(self) -> float:
        """Returns how many instructions the warps of one SM issue in a second: one a cycle and scheduler."""
        return PARTITIONS * self.clock * 1e9


CARDS: dict[str, Card] = {
    "a100": Card(
        name="NVIDIA A100 SXM4 80GB",
        target="sm_80",
        sm_count=108,
        clock=1.41,
        bandwidth=2039.0,
        peaks={"16bit": 312.0, "int8": 624.0, "fp32": 19.5},
        l2_bytes=40 << 20,
        l2_bandwidth=4000.0,
        source="NVIDIA A100 data sheet (June 2021); A100 architecture white paper, table 1",
    ),
    "h100": Card(
        name="NVIDIA H100 SXM5 80GB",
        target="sm_90",
        sm_count=132,
        clock=1.755,
        bandwidth=3350.0,
        peaks={"16bit": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 66.9},
        l2_bytes=50 << 20,
        l2_bandwidth=8000.0,
        source="NVIDIA H100 data sheet; H100 architecture white paper, table 2; the clock it holds under load",
    ),
    "h200": Card(
        name="NVIDIA H200 SXM5 141GB",
        target="sm_90",
        sm_count=132,
        clock=1.755,
        bandwidth=4800.0,
        peaks={"16bit": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 66.9},
        l2_bytes=50 << 20,
        l2_bandwidth=8000.0,
        source="NVIDIA H200 data sheet: memory of HBM3e, else an H100; the clock that an H100 holds under load",
    ),
    "b200": Card(
        name="NVIDIA B200 SXM6 192GB",
        target="sm_100",
        sm_count=148,
        clock=1.98,
        bandwidth=7700.0,
        peaks={"16bit": 2250.0, "fp8": 4500.0, "int8": 4500.0, "fp32": 75.0},
        l2_bytes=126 << 20,
        l2_bandwidth=18000.0,
        source="NVIDIA HGX B200 data sheet, dense rates; SMs and clock as published comparisons list them",
    ),
}


# one of each target, for what is compiled once a target
TYPICAL = tuple(CARDS[name] for name in ("a100", "h100", "b200"))


def find_card(name: str) -> Card:
    if name not in CARDS:
        raise ValueError(f"gs_kernels.tuning: card must be one of {', '.join(CARDS)}, got {name!r}")
    return CARDS[name]


def card_of(device_name: str) -> Card | None:
    """Returns the description of a GPU by the name that its driver gives it: `card_of("NVIDIA H100 80GB HBM3")`."""
    words = device_name.lower().replace("-", " ").split()
    return next((card for key, card in CARDS.items() if key in words), None)


def card_for(device_name: str, sm: int) -> Card:
    """Returns the description that stands for a GPU: its own, else that of the nearest kind that is not newer."""
    older = [card for card in TYPICAL if card.sm <= sm]
    return card_of(device_name) or (older or TYPICAL)[-1 if older else 0]


_assumed: list[Card] = []


@contextmanager
def assumed(card: Card) -> Iterator[None]:
    """Has plans inside the block chosen as on this card, which need not be there."""
    _assumed.append(card)
    bound_calls.forget()
    try:
        yield
    finally:
        _assumed.pop()
        bound_calls.forget()


def assumed_card() -> Card | None:
    return _assumed[-1] if _assumed else None


def card_here(sm: int, sm_count: int) -> Card:
    """Returns the card that plans are chosen for: the assumed one, that of the GPU in use, else the nearest typical."""
    if _assumed and (_assumed[-1].target, _assumed[-1].sm_count) == (f"sm_{sm}", sm_count):
        return _assumed[-1]
    return _card_here(sm, sm_count)


@cache
def _card_here(sm: int, sm_count: int) -> Card:
    present = capabilities(torch.cuda.current_device()) if torch.cuda.is_available() else None
    name = present.name if present is not None and (present.sm, present.sm_count) == (sm, sm_count) else ""
    card = card_for(name, sm)
    share = sm_count / card.sm_count
    return replace(card, sm_count=sm_count, bandwidth=card.bandwidth * share, l2_bandwidth=card.l2_bandwidth * share)
