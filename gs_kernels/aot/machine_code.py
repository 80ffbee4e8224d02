"""Describes the machine code of one kernel in terms that NVIDIA and AMD share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """Holds opcode, with its modifiers ("LDG.E.128"), and kind: "load", "store", "spill", "mma", "exit" or "other".

    nbytes: what one thread moves to or from global memory. jump: index of the instruction that a branch goes to.
    from_registers: of a wgmma, whether its left operand is in registers and not in shared memory.
    pending: of a wait for wgmmas, how many groups of them it leaves in flight.
    """

    opcode: str
    kind: str = "other"
    nbytes: int = 0
    jump: int | None = None
    from_registers: bool = False
    pending: int | None = None


@dataclass(frozen=True)
class Code:
    """Holds a kernel's instructions, without padding and what it calls out of line (the slow path of a division)."""

    registers: int
    body: tuple[Instruction, ...]

    @property
    def loop(self) -> tuple[Instruction, ...]:
        """Returns the longest innermost loop that multiplies matrices, else that touches memory; empty if none does."""
        spans = [(ins.jump, i) for i, ins in enumerate(self.body) if ins.jump is not None and ins.jump < i]
        inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
        bodies = [self.body[a : b + 1] for a, b in inner]
        # a barrier wait is a loop too, but it neither moves data nor multiplies
        multiplying = [body for body in bodies if any(ins.kind == "mma" for ins in body)]
        moving = [body for body in bodies if any(ins.kind in ("load", "store") for ins in body)]
        return max(multiplying or moving, key=len, default=())

    @property
    def hot(self) -> tuple[Instruction, ...]:
        return self.loop or self.body
