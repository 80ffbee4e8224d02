"""Runs the few PTX instructions that kernels hold as text, on numpy: inline assembly cannot be interpreted."""

from __future__ import annotations

import re

import numpy as np

U32 = np.uint32


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _prmt(a, b, select):
    bytes_ = [(a >> U32(8 * i)) & U32(255) for i in range(4)] + [(b >> U32(8 * i)) & U32(255) for i in range(4)]
    return sum((bytes_[int(select) >> (4 * i) & 7] << U32(8 * i) for i in range(4)), np.zeros_like(a))


INSTRUCTIONS = {
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
}


def run(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """What `$0..` hold after text has run with `inputs`, uint32 arrays, in the registers that follow them."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in re.split(r"[;{}]", text):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, operands = statement.strip().split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else U32(int(s, 0)) for s in sources]
        registers[target] = np.asarray(INSTRUCTIONS[name](*values), U32)
    return [registers[f"${i}"] for i in range(outputs)]
