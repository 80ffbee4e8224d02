"""Describes GPUs by their makers' data sheets: what the cost model divides bytes, products and instructions by."""

from __future__ import annotations

from dataclasses import dataclass

from gs_kernels.aot.targets import PARTITIONS


@dataclass(frozen=True)
class Card:
    """Describes one GPU.

    target: a name of `gs_kernels.aot.TARGETS`. bandwidth: of its memory, GB/s. clock: highest of its SMs, GHz.

    peaks: TFLOP/s (or TOP/s) of dense products, by the kind of operands that `Work.flops` names.
    launch_us: from the start of a kernel in a CUDA graph to its first instruction. early_us: from the end of the kernel
    before it to the first instruction that waited for that. latency_us: of memory under load. All three are round
    numbers, of no data sheet.
    """

    name: str
    target: str
    sm_count: int
    clock: float
    bandwidth: float
    peaks: dict[str, float]
    source: str
    launch_us: float = 2.0
    early_us: float = 1.0
    latency_us: float = 0.7

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
        source="NVIDIA A100 data sheet (June 2021); A100 architecture white paper, table 1",
    ),
    "h100": Card(
        name="NVIDIA H100 SXM5 80GB",
        target="sm_90",
        sm_count=132,
        clock=1.755,
        bandwidth=3350.0,
        peaks={"16bit": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 66.9},
        source="NVIDIA H100 data sheet; H100 architecture white paper, table 2; the clock it holds under load",
    ),
    "h200": Card(
        name="NVIDIA H200 SXM5 141GB",
        target="sm_90",
        sm_count=132,
        clock=1.755,
        bandwidth=4800.0,
        peaks={"16bit": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 66.9},
        source="NVIDIA H200 data sheet: memory of HBM3e, else an H100; the clock that an H100 holds under load",
    ),
    "b200": Card(
        name="NVIDIA B200 SXM6 192GB",
        target="sm_100",
        sm_count=148,
        clock=1.98,
        bandwidth=7700.0,
        peaks={"16bit": 2250.0, "fp8": 4500.0, "int8": 4500.0, "fp32": 75.0},
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
