"""Reads from Triton IR and arguments what one launch has to do: bytes, matrix products, turns of its loop."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gs_kernels.aot.compile import Launch

_LOCATION = re.compile(r"\s*loc\(.*$")
_PARAMETER = re.compile(r"(%\w+): ")
_DEFINITION = re.compile(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
_VALUE = re.compile(r"%[\w#]+")
_NUMBER = re.compile(r"(?:-?\d+|true|false)\b")
_LOOP = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
_ACCESS = re.compile(r": tensor<(?:([\dx]+)x)?!tt\.ptr<[a-z]*(\d+)")
_DOT = re.compile(r"tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+> ->")

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": operator.floordiv,
    "arith.remsi": operator.mod,
    "arith.minsi": min,
    "arith.maxsi": max,
}
_SAME = ("arith.extsi", "arith.trunci", "arith.index_cast")
_POINTERS = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape", "tt.trans")
KINDS = {"bf16": "16bit", "f16": "16bit", "i8": "int8", "f32": "fp32"}


@dataclass(frozen=True)
class Work:
    """Counts the work of a whole launch. loaded, stored: bytes of the tensors that it reads and writes, each once.

    asked: bytes that its programs load and store in all, the same ones by several too: what passes L2.
    reads, writes: those tensors, by `id`, each with its bytes.
    flops: of matrix products, by the kind of their operands: "16bit", "int8", "fp8" or "fp32".
    turns: of its longest loop, as the program runs it that has most, of the first and the last; 1 without a loop.
    early: whether it is launched while the launch before it runs, and waits for that on the GPU.
    """

    programs: int
    loaded: int
    stored: int
    flops: dict[str, int]
    turns: int
    early: bool = False
    asked: int = 0
    reads: dict[int, int] = field(default_factory=dict, compare=False)
    writes: dict[int, int] = field(default_factory=dict, compare=False)

    @property
    def nbytes(self) -> int:
        return self.loaded + self.stored


def _end(lines: Sequence[str], at: int) -> int:
    """Returns where the region ends that line `at` is the first of."""
    depth = 1
    while depth:
        line = lines[at]
        depth += line.endswith("{") - line.startswith("}")
        at += 1
    return at


class _Reader:
    """Follows a program through the IR: integers that it can know, and which argument a pointer points into."""

    def __init__(self, values: list[object], program: tuple[int, ...]) -> None:
        self.values = values
        self.program = program  # its number along each axis
        self.tensors: dict[str, torch.Tensor] = {}
        self.integers: dict[str, int] = {}
        self.nbytes: dict[str, int] = {}  # of the tensor that an argument is
        self.arguments: dict[str, str] = {}  # that a pointer points into
        self.repeats = 1  # of what is read: turns of the loop around it, if there is one
        self.loaded: set[str] = set()
        self.stored: set[str] = set()
        self.flops: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # "load" or "store" -> bytes
        self.turns = 1

    def read(self, lines: Sequence[str]) -> None:
        """Reads lines in the order in which the program runs them: a loop that has others in it turn by turn."""
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if line.startswith("tt.func"):
                self._parameters(line)
            elif loop := _LOOP.search(line):
                end = _end(lines, at)
                self._loop(line, lines[at:end], *loop.groups())
                at = end
            elif match := _DEFINITION.match(line):
                self._define(*match.groups())
            elif line.startswith("tt.store"):
                self._touch(self.stored, line, "store")

    def _parameters(self, line: str) -> None:
        for name, value in zip(_PARAMETER.findall(line), self.values, strict=True):
            if isinstance(value, torch.Tensor):
                self.arguments[name], self.nbytes[name], self.tensors[name] = name, value.nbytes, value
            elif isinstance(value, int):
                self.integers[name] = int(value)

    def _loop(self, line: str, body: Sequence[str], counter: str, first: str, last: str, step: str) -> None:
        start, stop, by = (self.integers.get(name) for name in (first, last, step))
        if start is None or stop is None or not by:
            raise ValueError(
                f"gs_kernels.aot: bounds of a loop must follow from sizes and program ids, got {line[:120]}"
            )
        turns = range(start, stop, by)
        for inside, outside in _CARRIED.findall(line.partition("iter_args(")[2]):
            self._same(inside, outside)
        if any(_LOOP.search(other) for other in body):
            before, sums = self.turns, 0
            for turn in turns:
                self.integers[counter], self.turns = turn, 0
                self.read(body)
                sums += self.turns
            self.turns = max(before, sums)
            return
        self.integers[counter] = start
        self.repeats = len(turns)
        self.read(body)
        self.repeats = 1
        self.turns = max(self.turns, len(turns))

    def _same(self, name: str, other: str) -> None:
        if other in self.integers:
            self.integers[name] = self.integers[other]
        if other in self.arguments:
            self.arguments[name] = self.arguments[other]

    def _define(self, name: str, op: str, rest: str) -> None:
        operands = _VALUE.findall(rest)
        if op == "arith.constant" and (number := _NUMBER.match(rest.strip())):
            self.integers[name] = int(number[0]) if number[0][-1].isdigit() else int(number[0] == "true")
        elif op == "tt.get_program_id":
            self.integers[name] = self.program["xyz".index(rest.strip()[0])]
        elif op in _SAME:
            self._same(name, operands[0])
        elif op in _ARITHMETIC:
            a, b = (self.integers.get(operand) for operand in operands[:2])
            if a is not None and b is not None and (b or op not in ("arith.divsi", "arith.remsi")):
                self.integers[name] = _ARITHMETIC[op](a, b)
        elif op in _POINTERS and operands[0] in self.arguments:
            self.arguments[name] = self.arguments[operands[0]]
        elif op in ("tt.load", "tt.atomic_rmw"):
            self._touch(self.loaded, rest, "load")
            if op == "tt.atomic_rmw":
                self._touch(self.stored, rest, "store")
        elif op == "tt.dot" and (dot := _DOT.search(rest)):
            m, k = dot[1].split("x")
            n = dot[3].split("x")[1]
            self.flops[KINDS.get(dot[2], "fp8")] += 2 * int(m) * int(n) * int(k) * self.repeats

    def _touch(self, touched: set[str], text: str, how: str) -> None:
        touched.update(self.arguments[operand] for operand in _VALUE.findall(text)[:1] if operand in self.arguments)
        if access := _ACCESS.search(text):
            self.asked[how] += math.prod(map(int, access[1].split("x"))) * int(access[2]) // 8 * self.repeats


def work_of(launch: Launch) -> Work:
    """Reads a launch that `record_launches` has yielded.

    Raises:
        ValueError: if the turns of a loop cannot be known before it runs.
    """
    signature = launch.compiled.src.signature
    values = [launch.args.get(name) for name, kind in signature.items() if kind != "constexpr"]
    lines = [line.strip() for line in launch.compiled.asm["ttir"].splitlines()]
    lines = [line if line.startswith("tt.func") else _LOCATION.sub("", line) for line in lines if line[:1] != "#"]
    grid = (*launch.grid, 1, 1)[:3]
    readers = [_Reader(values, program) for program in {(0, 0, 0), tuple(size - 1 for size in grid)}]
    for one in readers:
        one.read(lines)
    reader = max(readers, key=lambda one: one.turns)  # of equal shares, some have a block more than others
    programs = math.prod(launch.grid)
    stored = sum(reader.nbytes[name] for name in reader.stored)
    return Work(
        programs=programs,
        loaded=sum(reader.nbytes[name] for name in reader.loaded),
        stored=stored,
        flops={kind: flops * programs for kind, flops in sorted(reader.flops.items())},
        turns=reader.turns,
        early=bool(launch.args.get("launch_pdl")),
        # other programs may store more than the first, but none what another does
        asked=reader.asked["load"] * programs + max(reader.asked["store"] * programs, stored),
        reads={id(reader.tensors[name]): reader.nbytes[name] for name in reader.loaded},
        writes={id(reader.tensors[name]): reader.nbytes[name] for name in reader.stored},
    )
