"""Says which instruction sets of this CPU are used: those that it has, less those that the user forbids.

`ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` forbid them to PyTorch and to oneDNN, e.g. `avx2` and `AVX2`; code of
this library obeys both, and `GS_CPU_ISA`, a name of `gs_kernels.cpu.compile.INSTRUCTION_SETS`, for itself alone. A
newer CPU so plays an older one, in one process from its start.
"""

from __future__ import annotations

from functools import cache

import torch

from gs_kernels.cpu.compile import instruction_sets
from gs_kernels.runtime.dispatch import UnsupportedError, variable

# what oneDNN may be limited to, from old to new; another text limits nothing
ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16")
NEEDS = {
    "avx2": "AVX2",
    "fma3": "AVX2",
    "avx_vnni": "AVX2_VNNI",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512_bf16": "AVX512_CORE_BF16",
}
LEVELS = {"AVX2": 1, "AVX512": 2}  # of ATen; less is the smallest set of the architecture


@cache
def has(name: str) -> bool:
    """Says whether instructions are there and not forbidden, by names of `torch.cpu.get_capabilities`."""
    if not torch.cpu.get_capabilities().get(name):
        return False
    needed = NEEDS.get(name, "AVX512_CORE" if name.startswith("avx512") else None)
    if name.startswith(("avx512", "amx")):
        return _level() >= LEVELS["AVX512"] and _allows(needed or ONEDNN[-1])
    return needed is None or (_level() >= LEVELS["AVX2"] and _allows(needed))


@cache
def _level() -> int:
    return LEVELS.get(torch.backends.cpu.get_cpu_capability(), 0)


def _allows(isa: str) -> bool:
    limit = variable("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA").upper()
    return limit not in ONEDNN or ONEDNN.index(isa) <= ONEDNN.index(limit)


def multiplies_int8() -> bool:
    """Says whether there are instructions that add up products of 8 bits: VNNI, or ARM's dot products."""
    return any(map(has, ("avx512_vnni", "avx_vnni", "dot")))


# what each set of gs_kernels.cpu.compile takes for granted
AVX2 = ("avx2", "fma3", "f16c")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
REQUIRED = {
    "generic": (),
    "avx2": AVX2,
    "avx_vnni": (*AVX2, "avx_vnni"),
    "avx512": AVX512,
    "avx512_vnni": (*AVX512, "avx512_vnni"),
    "dotprod": ("dot",),
}


@cache
def instruction_set() -> str:
    """Returns the newest set of instructions that kernels are compiled for and this CPU may use.

    Raises:
        UnsupportedError: if `GS_CPU_ISA` names none of them.
    """
    usable = [name for name in instruction_sets() if all(map(has, REQUIRED[name]))]
    limit = variable("GS_CPU_ISA")
    if limit and limit not in usable:
        raise UnsupportedError(f"GS_CPU_ISA: must be one of {', '.join(usable)} on this CPU, got {limit!r}; unset it")
    return limit or usable[-1]


def described() -> str:
    """Names the instructions in use for people, e.g. "AVX-512 VNNI" or "AVX2"."""
    if instruction_set().startswith("avx512"):
        extra = [text for name, text in (("avx512_vnni", "VNNI"), ("avx512_bf16", "BF16")) if has(name)]
        return " ".join(["AVX-512", *extra, *(["AMX"] if has("amx_int8") or has("amx_bf16") else [])])
    if instruction_set().startswith("avx"):
        return "AVX2 VNNI" if instruction_set() == "avx_vnni" else "AVX2"
    arm = [text for name, text in (("dot", "DotProd"), ("sve", "SVE"), ("bf16", "BF16"), ("i8mm", "I8MM")) if has(name)]
    return " ".join(arm) or torch.backends.cpu.get_cpu_capability()
