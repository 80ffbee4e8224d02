"""Lists the GPUs that kernels are compiled for, and tells how many blocks of a kernel a processor of theirs holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

PARTITIONS = 4  # schedulers of an SM, SIMDs of a CU: each owns a quarter of the registers


@dataclass(frozen=True)
class Target:
    """Describes a processor (SM or CU). Sizes in bytes, registers in 32-bit words, taken by `register_unit`.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; LLVM AMDGPU usage, gfx942.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    max_warps: int
    max_blocks: int
    shared_per_sm: int
    shared_per_block: int
    shared_reserved: int
    registers: int
    register_unit: int


def _nvidia(sm: int, shared_kb: int, max_warps: int = 64, max_blocks: int = 32) -> Target:
    shared = shared_kb * 1024
    return Target(f"sm_{sm}", "cuda", sm, 32, max_warps, max_blocks, shared, shared - 1024, 1024, 65536, 256)


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _nvidia(80, 164),
        _nvidia(89, 100, max_warps=48, max_blocks=24),
        _nvidia(90, 228),
        _nvidia(100, 228),
        _nvidia(120, 100, max_warps=48, max_blocks=24),
        Target("gfx942", "hip", "gfx942", 64, 32, 16, 65536, 65536, 0, 131072, 512),
    )
}


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"gs_kernels.aot: target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


@dataclass(frozen=True)
class Occupancy:
    """Holds blocks and warps resident on one processor, and what stops one more: registers, shared, warps or blocks."""

    blocks: int
    warps: int
    limiter: str


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    unit = target.register_unit
    per_warp = math.ceil(max(registers, 1) * target.warp_size / unit) * unit
    shared = math.ceil((shared_bytes + target.shared_reserved) / 128) * 128
    limits = {
        "warps": target.max_warps // num_warps,
        "blocks": target.max_blocks,
        "registers": target.registers // PARTITIONS // per_warp * PARTITIONS // num_warps,
        "shared": target.shared_per_sm // shared if shared else target.max_blocks,
    }
    if shared_bytes > target.shared_per_block:
        limits["shared"] = 0
    limiter = min(limits, key=lambda k: limits[k])
    return Occupancy(limits[limiter], limits[limiter] * num_warps, limiter)
