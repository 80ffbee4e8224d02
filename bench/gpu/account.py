"""Accounts for every item of a step: how it ended, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

RESULTS = ("done", "failed", "skipped")


@dataclass
class Account:
    """ends: result and reason of each item that ended. planned: None until the items are known."""

    step: str
    planned: list[str] | None
    ends: dict[str, tuple[str, str]] = field(default_factory=dict)
    running: str = ""
    seconds: float = 0.0
    why: str = ""

    @property
    def left(self) -> list[str] | None:
        return None if self.planned is None else [item for item in self.planned if item not in self.ends]

    @property
    def counts(self) -> Counter[str]:
        return Counter(result for result, _ in self.ends.values())

    @property
    def line(self) -> str:
        """Tells in one line how the step ended, with the commonest reason of what failed, then of what was skipped."""
        planned = "unknown" if self.planned is None else len(self.planned)
        counts = ", ".join(f"{self.counts[result]} {result}" for result in RESULTS)
        text = f"{self.step}: {planned} planned, {counts}, {self.seconds:.0f} s"
        for result in ("failed", "skipped"):
            reasons = Counter(why for found, why in self.ends.values() if found == result)
            if reasons:
                text += f"; {result}: {reasons.most_common(1)[0][0][:150]}"
        return text + (f"; {self.why}" if self.why else "")
