"""Reads what a network may take: `40% bytes`, `12 ms`, `3 bits`, `50% macs`, or two of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("bytes", "params", "macs", "bops", "latency")
UNITS = {"MB": 10**6, "GB": 10**9, "KB": 10**3, "kB": 10**3, "MiB": 2**20, "GiB": 2**30, "KiB": 2**10}
FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%\s*\w+|\w+)\s*")
EXAMPLES = "'40% bytes', '80 MB', '3 bits', '50% macs', '30% bops', '60% latency' or '12 ms'"


@dataclass(frozen=True)
class Budget:
    """Says how much a network may take.

    Args:
        kind: of the cost: bytes, params, macs, bops or latency.
        amount: of `unit`.
        unit: "%" of the float network; "bits" a weight, scales included; "ms"; or a number of bytes, such as "MB".
    """

    kind: str
    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str, who: str, units: Sequence[str] = (), examples: str = EXAMPLES) -> Budget:
        """Reads the text of one budget.

        Args:
            units: that are known, such as "bits" and "%bytes"; all if there are none.

        Raises:
            ValueError: if it has another form, or is 0.
        """
        match = FORM.fullmatch(text) if isinstance(text, str) else None
        unit = match[2].replace(" ", "") if match else ""
        kind = unit[1:] if unit.startswith("%") else {"bits": "bytes", "ms": "latency"}.get(unit, "")
        kind = "bytes" if unit in UNITS else kind
        if match is None or kind not in KINDS or float(match[1]) <= 0 or (units and unit not in units):
            raise ValueError(f"{who}: budget must be like {examples}, got {text!r}")
        return cls(kind, float(match[1]), "%" if unit.startswith("%") else unit)

    @classmethod
    def parse_all(cls, text: str, who: str) -> tuple[Budget, ...]:
        """Reads one budget, or two with a comma between.

        Raises:
            ValueError: as `parse`, or if there are more, or two of one kind.
        """
        parts = text.split(",") if isinstance(text, str) else [text]
        found = tuple(cls.parse(part, who) for part in parts)
        kinds = [one.kind for one in found]
        if len(found) > 2 or len(set(kinds)) < len(kinds):
            raise ValueError(f"{who}: budget must be one, or two of different kinds, got {text!r}")
        return found

    def of(self, before: float, numbers: int = 0, others: float = 0.0) -> float:
        """Returns the most that the cost may be.

        Args:
            before: the cost of the float network.
            numbers: how many weights have a choice, for bits.
            others: the cost of all that has no choice, for bits.
        """
        if self.unit == "%":
            return self.amount / 100 * before
        if self.unit == "bits":
            return self.amount * numbers / 8 + others
        return self.amount * UNITS.get(self.unit, 1)

    def __str__(self) -> str:
        return f"{self.amount:g}% {self.kind}" if self.unit == "%" else f"{self.amount:g} {self.unit}"
