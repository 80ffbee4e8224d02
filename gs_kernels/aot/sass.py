"""Reads NVIDIA machine code: a cubin through `cuobjdump`, into instructions that the report understands."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import zlib
from bisect import bisect_left
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from gs_kernels.aot.machine_code import Code, Instruction

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_MMA = re.compile(r"[HQI]GMMA|[HIQD]MMA|UTC\w*MMA")
_LEFT_REGISTERS = re.compile(r"[HQI]GMMA\S*\s+R\d+, R\d+, gdesc")
_WIDTH = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LOADS = ("LDG", "LDGSTS", "LD")
_STORES = ("STG", "ST", "RED", "REDG", "ATOM", "ATOMG")
_TEXT = "disassembled.zlib"  # file of a cache
_BULK = {"UTMALDG": "load", "UBLKCP": "load", "UTMASTG": "store", "UTMAREDG": "store"}


def find_cuobjdump() -> str:
    """Returns the path of the disassembler: the one inside Triton, else the one on PATH."""
    from triton import knobs

    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        path = shutil.which("cuobjdump")
    if path is None:
        raise RuntimeError(
            "gs_kernels.aot: needs cuobjdump, got none in triton/backends/nvidia/bin or on PATH; install CUDA's"
        )
    return path


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        argv = [find_cuobjdump(), "-res-usage", "-sass", file.name]
        run = subprocess.run(argv, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(
            f"gs_kernels.aot: cuobjdump must read the cubin, got exit code {run.returncode}: {run.stderr}"
        )
    return run.stdout


def classify(opcode: str) -> tuple[str, int]:
    """Returns kind and bytes per thread of an opcode: `classify("LDG.E.128") == ("load", 16)`."""
    name, *modifiers = opcode.split(".")
    if name in _LOADS or name in _STORES:
        width = next((_WIDTH[m] for m in modifiers if m in _WIDTH), 4)
        return ("load" if name in _LOADS else "store"), width
    if name in _BULK:
        return _BULK[name], 16
    if name in ("LDL", "STL"):
        return "spill", 0
    if _MMA.fullmatch(name):
        return "mma", 0
    return ("exit" if name == "EXIT" else "other"), 0


def parse(text: str) -> Code:
    """Reads the code of the (one) kernel in the output of `cuobjdump -res-usage -sass`."""
    lines = [(int(address, 16), op, rest, _goal(op, rest)) for address, op, rest in _LINE.findall(text)]
    # functions called out of line follow the kernel's own code: each begins at the last place that is called before it
    # returns; a call of what never returns is a way out of a loop
    goals = [goal for _, op, _, goal in lines if op.startswith("CALL") and goal is not None]
    returns = (address for address, op, _, _ in lines if op.startswith("RET"))
    end = min((max((goal for goal in goals if goal <= back), default=1 << 62) for back in returns), default=1 << 62)
    lines = [line for line in lines if line[0] < end and line[1] != "NOP" and line[3] != line[0]]
    addresses = [line[0] for line in lines]
    body = tuple(
        Instruction(
            op,
            *classify(op),
            None if goal is None or goal >= end else bisect_left(addresses, goal),
            _LEFT_REGISTERS.match(op + rest) is not None,
            _pending(op, rest),
        )
        for _, op, rest, goal in lines
    )
    registers = re.search(r"REG:(\d+)", text)
    return Code(int(registers[1]) if registers else 0, body)


@lru_cache(maxsize=512)
def read_cubin(cubin: bytes) -> Code:
    """Returns `parse(disassemble(cubin))`, the text kept in Triton's cache by the cubin's bytes, for other processes.

    The disassembler takes a quarter of a second of the smallest kernel: most of the time of a report.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(triton.__version__.encode() + cubin).hexdigest())
    if (path := cache.get_file(_TEXT)) is not None:
        with suppress(zlib.error):  # of a file that a crash has cut short
            return parse(zlib.decompress(Path(path).read_bytes()).decode())
    text = disassemble(cubin)
    cache.put(zlib.compress(text.encode()), _TEXT)
    return parse(text)


def _pending(opcode: str, operands: str) -> int | None:
    match = re.search(r"gsb0, 0x([0-9a-f]+)", operands)
    return int(match[1], 16) if match and opcode.startswith("WARPGROUP.DEPBAR") else None


def _goal(opcode: str, operands: str) -> int | None:
    """Returns the address that a branch or a call goes to."""
    match = re.search(r"0x([0-9a-f]+)", operands)
    return int(match[1], 16) if match and opcode.startswith(("BRA", "CALL")) else None
