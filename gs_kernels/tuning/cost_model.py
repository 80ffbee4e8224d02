"""Predicts the least time of a launch on a described card: its bytes, its products or its instructions, whichever is
slowest, after the launch itself. Nothing here is timed; `bench.predict` says how far measured rows are from it.

    with record_launches("sm_90") as launches:
        launcher(x_meta)
    print(predict(launches[0], CARDS["h100"]))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gs_kernels.aot.compile import Launch
from gs_kernels.aot.ir_cost import Work, work_of
from gs_kernels.aot.report import Report, report
from gs_kernels.aot.trace import Call, Trace
from gs_kernels.tuning.gpu_specs import Card

ALONE = 2.0  # cycles between two instructions of a warp that waits for no other. No number of a data sheet
ISSUED = 0.7  # of what schedulers could issue, when warps are many. No number of a data sheet


@dataclass(frozen=True)
class Prediction:
    """Holds microseconds. bound: what takes longest, "bytes", "products" or "instructions".

    waves: programs per program that the card holds at a time.
    """

    launch_us: float
    bytes_us: float
    products_us: float
    instructions_us: float
    waves: float

    @property
    def us(self) -> float:
        return self.launch_us + max(self.bytes_us, self.products_us, self.instructions_us)

    @property
    def bound(self) -> str:
        parts = {"bytes": self.bytes_us, "products": self.products_us, "instructions": self.instructions_us}
        return max(parts, key=lambda name: parts[name])


def estimate(kernel: Report, work: Work, card: Card) -> Prediction:
    """Predicts from what a launch does and what its machine code costs.

    The busiest SM has `ceil(programs / SMs)` programs to issue and to multiply. Memory gives what has been asked for:
    the loads of the programs on SMs at a time, one latency later, and no more than its bandwidth.

    Raises:
        ValueError: if the kernel was compiled for another target than the card's, or no block of it fits.
    """
    if kernel.target != card.target:
        raise ValueError(f"gs_kernels.tuning: {card.name} runs {card.target}, got a kernel for {kernel.target}")
    if not kernel.occupancy.blocks:
        raise ValueError(f"gs_kernels.tuning: a block of {kernel.kernel} must fit an SM, got none on {card.name}")
    busiest = -(-work.programs // card.sm_count)
    uneven = busiest * card.sm_count / work.programs
    issued = float(kernel.instructions)
    if kernel.loop_instructions:
        issued += kernel.loop_instructions * (work.turns / kernel.unroll - 1)
    unknown = set(work.flops) - set(card.peaks)
    if unknown:
        raise ValueError(f"gs_kernels.tuning: {card.name} must know a peak for {', '.join(unknown)} products, got none")
    return Prediction(
        launch_us=card.early_us if work.early else card.launch_us,
        bytes_us=work.nbytes / min(card.bandwidth * 1e3, _in_flight(kernel, work, card) / card.latency_us),
        products_us=sum(uneven * flops / card.peaks[kind] / 1e6 for kind, flops in work.flops.items()),
        instructions_us=busiest * kernel.num_warps * issued / card.issue_rate * 1e6,
        waves=work.programs / (kernel.occupancy.blocks * card.sm_count),
    )


def _in_flight(kernel: Report, work: Work, card: Card) -> float:
    """Returns the bytes that programs on the card wait for at once: in a pipeline what its shared memory holds."""
    running = min(work.programs, kernel.occupancy.blocks * card.sm_count)
    threads = 32 * kernel.num_warps
    loads = sum(nbytes * n for nbytes, n in kernel.loads.items()) * threads / kernel.unroll
    return running * max(kernel.shared_bytes if kernel.opcodes["LDGSTS"] else 0, loads)


@lru_cache(maxsize=256)
def _reported(compiled: Any, target: str) -> Report:
    return report(compiled, target, elements=1)


def bandwidth_share(kernel: Report, work: Work, card: Card) -> float | None:
    """Predicts the share of its memory's bandwidth that a kernel reaches whose programs load, compute and store once.

    Programs that an SM holds do so in turn, and wait for one another at the schedulers and at the memory: the mean
    values of a closed queueing network (Reiser and Lavenberg 1980, J. ACM 27, 313). None for kernels that multiply
    matrices or loop: they load while they compute.
    """
    if work.flops or kernel.loop_instructions:
        return None
    moving = 1e6 * work.nbytes / work.programs / (card.bandwidth * 1e9 / card.sm_count)
    issuing = 1e6 * kernel.num_warps * kernel.instructions / (card.issue_rate * ISSUED)
    waiting = card.latency_us + max(0.0, ALONE * kernel.instructions / (card.clock * 1e3) - issuing)
    at_memory = at_schedulers = rate = 0.0
    for programs in range(1, min(kernel.occupancy.blocks, math.ceil(work.programs / card.sm_count)) + 1):
        moved, issued = moving * (1 + at_memory), issuing * (1 + at_schedulers)
        rate = programs / (waiting + moved + issued)
        at_memory, at_schedulers = rate * moved, rate * issued
    return rate * moving


def predict(launch: Launch, card: Card) -> Prediction:
    return estimate(_reported(launch.compiled, card.target), work_of(launch), card)


def predict_call(call: Call, card: Card) -> Prediction:
    """Predicts one of torch's ops, at the card's peak: what a library could reach, not what it does."""
    return Prediction(
        launch_us=card.launch_us,
        bytes_us=call.nbytes / card.bandwidth / 1e3,
        products_us=call.flops / card.peaks[call.kind] / 1e6 if call.flops else 0.0,
        instructions_us=0.0,
        waves=0.0,
    )


def predict_trace(trace: Trace, card: Card) -> list[Prediction]:
    """Predicts everything in a trace that was taken for the card's target, one after the other."""
    return [predict(launch, card) for launch in trace.launches] + [predict_call(call, card) for call in trace.calls]
