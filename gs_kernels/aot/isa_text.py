"""Reads assembly text with labels: AMD's (the machine code itself) and PTX (to see which loops ptxas unrolled)."""

from __future__ import annotations

import re
from collections.abc import Callable

from gs_kernels.aot.machine_code import Code, Instruction

_LABEL = re.compile(r"^([.$]\w+):")
_STATEMENT = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9_.]*)\s*([^;/]*)")
_GCN_WIDTH = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store|atomic)_(?:([a-z]+?)(?:x(\d))?(?:_d16\w*)?$)?")


def _parse(
    text: str, classify: Callable[[str], tuple[str, int]], is_branch: Callable[[str], bool]
) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    statements: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(statements)
        elif statement := _STATEMENT.match(line):
            statements.append((statement[1], statement[2].strip()))
    return tuple(
        Instruction(op, *classify(op), labels.get(operands) if is_branch(op) else None) for op, operands in statements
    )


def classify_gcn(opcode: str) -> tuple[str, int]:
    """Returns kind and bytes per thread: `classify_gcn("global_load_dwordx4") == ("load", 16)`."""
    if access := _GCN_ACCESS.match(opcode):
        what, unit, count = access.groups()
        nbytes = _GCN_WIDTH.get(unit or "", 4) * int(count or 1)
        return ("load" if what == "load" else "store"), nbytes
    if opcode.startswith("scratch_"):
        return "spill", 0
    if opcode.startswith(("v_mfma", "v_smfmac", "v_wmma")):
        return "mma", 0
    return ("exit" if opcode == "s_endpgm" else "other"), 0


def parse_gcn(text: str) -> Code:
    """Reads the code of the (one) kernel in AMD assembly, with the registers (VGPR) of its metadata."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    body = _parse(text, classify_gcn, lambda op: op.startswith(("s_branch", "s_cbranch")))
    return Code(int(registers[1]) if registers else 0, body)


def classify_ptx(opcode: str) -> tuple[str, int]:
    """Returns the kind of a PTX instruction; PTX shows what a turn of a loop does before ptxas unrolls it."""
    if opcode.startswith(("ld.global", "cp.async.c", "cp.async.bulk")) and "commit" not in opcode:
        return "load", 0
    if opcode.startswith(("st.global", "red.global", "atom.global")):
        return "store", 0
    if opcode.startswith(("mma.", "wgmma.mma", "tcgen05.mma")):
        return "mma", 0
    return "other", 0


def parse_ptx(text: str) -> Code:
    return Code(0, _parse(text, classify_ptx, lambda op: op.startswith("bra")))
