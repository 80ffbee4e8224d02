"""Predicts the least time of a launch on a described card: its bytes, its products or its instructions, whichever is
slowest, after the launch itself. Nothing here is timed; `bench.predict` says how far measured rows are from it.

    with record_launches("sm_90") as launches:
        launcher(x_meta)
    print(predict(launches[0], CARDS["h100"]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gs_kernels.aot.compile import Launch
from gs_kernels.aot.ir_cost import Work, work_of
from gs_kernels.aot.report import Report, report
from gs_kernels.aot.trace import Call, Trace
from gs_kernels.tuning.gpu_specs import Card
from gs_kernels.tuning.launch_time import ALONE, TURN, Program, launch_times

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


def estimate(kernel: Report, work: Work, card: Card, cached: int = 0) -> Prediction:
    """Predicts from what a launch does and what its machine code costs, as `launch_times` assumes.

    cached: bytes that it writes for a launch behind it, or reads of one before, and that stay in L2 meanwhile.

    Raises:
        ValueError: if the kernel was compiled for another target than the card's, or no block of it fits.
    """
    if kernel.target != card.target:
        raise ValueError(f"gs_kernels.tuning: {card.name} runs {card.target}, got a kernel for {kernel.target}")
    held = kernel.occupancy.blocks
    if not held:
        raise ValueError(f"gs_kernels.tuning: a block of {kernel.kernel} must fit an SM, got none on {card.name}")
    unknown = set(work.flops) - set(card.peaks)
    if unknown:
        raise ValueError(f"gs_kernels.tuning: {card.name} must know a peak for {', '.join(unknown)} products, got none")
    issued = float(kernel.instructions)
    if kernel.loop_instructions:
        issued += kernel.loop_instructions * (work.turns / kernel.unroll - 1)
    multiplies = kernel.loop_instructions > 0 and kernel.mma is not None
    memory, asked = work.nbytes - cached, max(work.asked, work.nbytes)
    products_us = sum(flops / card.peaks[kind] / 1e6 for kind, flops in work.flops.items())
    program = Program(
        memory=memory / work.programs,
        through_l2=asked / work.programs,
        waiting=_waiting(kernel) * (memory / asked if multiplies else 1),
        products_us=products_us * card.sm_count / work.programs,
        issue_us=kernel.num_warps * issued / card.issue_rate * 1e6,
        alone_us=(ALONE * issued + TURN * work.turns) / card.clock / 1e3 if multiplies else 0.0,
        loops=multiplies,
    )
    times = launch_times(work.programs, held, program, card)
    return Prediction(
        launch_us=card.early_us if work.early else card.launch_us,
        bytes_us=times.bytes_us,
        products_us=times.products_us,
        instructions_us=times.instructions_us,
        waves=work.programs / (held * card.sm_count),
    )


def _waiting(kernel: Report) -> float:
    """Returns the bytes that a program waits for at once: in a pipeline what its shared memory holds."""
    loads = sum(nbytes * n for nbytes, n in kernel.loads.items()) * 32 * kernel.num_warps / kernel.unroll
    return max(kernel.shared_bytes if kernel.opcodes["LDGSTS"] else 0, loads)


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


def estimate_all(kernels: Sequence[Report], works: Sequence[Work], card: Card) -> list[Prediction]:
    """Predicts launches one after the other: what one leaves for another stays in L2, if half of it holds that."""
    found = []
    for i, (kernel, work) in enumerate(zip(kernels, works, strict=True)):
        left = [nbytes for t, nbytes in work.writes.items() if any(t in other.reads for other in works[i + 1 :])]
        left += [nbytes for t, nbytes in work.reads.items() if any(t in other.writes for other in works[:i])]
        found.append(estimate(kernel, work, card, cached=sum(n for n in left if n <= card.l2_bytes // 2)))
    return found


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
    kernels = [_reported(launch.compiled, card.target) for launch in trace.launches]
    works = [work_of(launch) for launch in trace.launches]
    return estimate_all(kernels, works, card) + [predict_call(call, card) for call in trace.calls]
