"""Reads from machine code what a compiled kernel costs, and checks it against the bounds of its case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from gs_kernels.aot.compile import Launch, record_launches
from gs_kernels.aot.isa_text import parse_gcn, parse_ptx
from gs_kernels.aot.machine_code import Code, Instruction
from gs_kernels.aot.sass import read_cubin
from gs_kernels.aot.targets import Occupancy, find_target, occupancy
from gs_kernels.runtime.opspec import AotCase


@dataclass(frozen=True)
class Report:
    """Holds static facts of one kernel on one target. Nothing here was timed.

    loads, stores: bytes of one access of one thread -> how many, in the hot loop if there is one, else in the kernel.
    mma: opcode of the matrix instruction there, None without one.
    from_shared: how many wgmmas there read their left operand from shared memory.
    in_flight: the fewest groups of wgmmas that a wait there leaves in flight; 0 drains the tensor cores each turn.
    instructions: of the kernel; loop_instructions: of its hot loop, 0 without one.
    opcodes: how often each opcode occurs in the hot part, without modifiers, e.g. {"FMUL": 16}.
    unroll: how many turns of the loop in the source one turn in the machine code does.
    per_element: instructions that one warp issues for one element, counted per thread:
        (loop or kernel instructions) * threads / (elements * unroll).
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int
    loads: Counter[int]
    stores: Counter[int]
    mma: str | None
    from_shared: int
    in_flight: int
    instructions: int
    loop_instructions: int
    opcodes: Counter[str]
    unroll: int
    per_element: float
    occupancy: Occupancy
    returns: bool
    writes: bool


def _count(code: Sequence[Instruction], kind: str) -> Counter[int]:
    return Counter(ins.nbytes for ins in code if ins.kind == kind)


def _unroll(machine: Code, ptx: Code) -> int:
    """ptxas unrolls loops that the compiler above it kept: the loads (or matrix products) of a turn tell how often."""
    for kind in ("load", "mma", "store"):
        before, after = (sum(ins.kind == kind for ins in code.loop) for code in (ptx, machine))
        if before and after:
            return max(1, round(after / before))
    return 1


def report(compiled: Any, target: str, elements: int) -> Report:
    """Reads a kernel that `compile_launches(target)` has yielded; `elements` as in `AotCase.elements`."""
    gpu = find_target(target)
    if gpu.backend == "cuda":
        code, ptx = read_cubin(compiled.asm["cubin"]), parse_ptx(compiled.asm["ptx"])
    else:
        code, ptx = parse_gcn(compiled.asm["amdgcn"]), Code(0, ())
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    unroll = _unroll(code, ptx)
    hot = code.hot
    return Report(
        kernel=compiled.name,
        target=target,
        registers=code.registers,
        spills=sum(ins.kind == "spill" for ins in code.body),
        shared_bytes=shared,
        num_warps=warps,
        loads=_count(hot, "load"),
        stores=_count(hot, "store") or _count(code.body, "store"),
        mma=next((ins.opcode.split(".")[0] for ins in hot if ins.kind == "mma"), None),
        from_shared=sum(ins.kind == "mma" and not ins.from_registers for ins in hot),
        in_flight=min((ins.pending for ins in hot if ins.pending is not None), default=0),
        instructions=len(code.body),
        loop_instructions=len(code.loop),
        opcodes=Counter(ins.opcode.split(".")[0] for ins in hot),
        unroll=unroll,
        per_element=len(hot) * warps * gpu.warp_size / (elements * unroll),
        occupancy=occupancy(gpu, code.registers, shared, warps),
        returns=any(ins.kind == "exit" for ins in code.body),
        writes=any(ins.kind == "store" for ins in code.body),
    )


def _mostly_wide(accesses: Counter[int], wide: int) -> bool:
    """Returns whether half of the bytes or more move `wide` at a time: scales may be narrow, a stream may not."""
    total = sum(nbytes * n for nbytes, n in accesses.items())
    return total > 0 and 2 * sum(nbytes * n for nbytes, n in accesses.items() if nbytes >= wide) >= total


def check(kernel: Report, case: AotCase) -> list[str]:
    """Lists what breaks the bounds of the case, one sentence each; empty if all is well."""
    if not kernel.returns or not kernel.writes:
        body = f"got {kernel.instructions} instructions; the compiler left a trap or removed the code"
        return [f"body must write to memory and return, {body}"]
    broken = []
    if kernel.spills:
        broken.append(f"must not spill registers, got {kernel.spills} stack accesses")
    if not kernel.occupancy.blocks:
        broken.append(f"one block must fit a processor, got none: too many {kernel.occupancy.limiter}")
    if case.main not in (None, kernel.kernel):
        return broken
    most = case.older_max_regs.get(".".join(version("triton").split(".")[:2]), case.max_regs)
    if kernel.registers > most:
        broken.append(f"must use at most {most} registers, got {kernel.registers}")
    # 512 bytes a warp: 16 a thread for NVIDIA's 32 threads, 8 for AMD's 64
    wide = 512 // find_target(kernel.target).warp_size
    if case.wide_loads and not _mostly_wide(kernel.loads, wide):
        broken.append(f"most bytes must be loaded {wide} at a time, got (bytes: loads) {dict(kernel.loads)}")
    if case.mma is not None and kernel.mma != case.mma:
        broken.append(f"must multiply with {case.mma}, got {kernel.mma}")
    if case.overlapped:
        if kernel.from_shared:
            broken.append(f"must feed wgmma from registers, got {kernel.from_shared} that read shared memory")
        if not kernel.in_flight:
            broken.append("must keep wgmmas in flight, got a wait for all of them in the loop")
    stored = kernel.opcodes["STS"]
    if case.max_shared_stores is not None and kernel.target.startswith("sm_") and stored > case.max_shared_stores:
        broken.append(f"must store to shared memory at most {case.max_shared_stores} times a turn, got {stored}")
    bound = case.max_instructions
    if bound is not None and kernel.target.startswith("sm_") and kernel.per_element > bound:
        broken.append(f"must issue at most {bound} instructions per element, got {kernel.per_element:.2f}")
    return broken


def launches_of(case: AotCase, target: str) -> list[Launch]:
    """Compiles what `case.launch()` launches; of each kernel, the first launch.

    Raises:
        RuntimeError: if `launch()` launched no kernel: a case that checks nothing.
    """
    with record_launches(target) as launches:
        case.launch()
    if not launches:
        raise RuntimeError(
            f"gs_kernels.aot: {case.name}.launch() must launch a kernel, got none; call the launcher itself"
        )
    first = {id(launch.compiled): launch for launch in reversed(launches)}
    return list(first.values())[::-1]


def reports(case: AotCase, target: str) -> list[Report]:
    """Reports what every kernel that `case.launch()` launches costs."""
    return [report(launch.compiled, target, case.elements) for launch in launches_of(case, target)]
