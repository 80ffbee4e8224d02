"""What an algorithm is going to do to a model, layer by layer, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PlanRow:
    """One layer. action: what will be done, or `keep` with the reason. settings: what `apply` needs to do it again."""

    site: str
    kind: str
    action: str
    detail: str = ""
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def fits(data: Any) -> bool:
        """True if `PlanRow(**data)` is a row: the fields of this class, of their types."""
        names = [name for name in PlanRow.__dataclass_fields__ if name != "settings"]
        return (
            isinstance(data, dict)
            and data.keys() == {*names, "settings"}
            and all(isinstance(data[name], str) for name in names)
            and isinstance(data["settings"], dict)
        )


@dataclass(frozen=True)
class Plan:
    """The dry run of an algorithm. `str(plan)` is a table; `plan.rows` the data; `plan.notes` why a tracer failed."""

    algorithm: str
    rung: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    def acted(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.action != "keep")

    def kept(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.action == "keep")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = render(
            ("layer", "kind", "action", "detail", "reason"),
            [(row.site, row.kind, row.action, row.detail, row.reason) for row in self.rows],
        )
        head = f"{self.algorithm}: {len(self.acted())} of {len(self.rows)} layers, graph read by {self.rung}"
        return "\n".join([head, table, *(f"note: {note}" for note in self.notes)])


def render(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table with aligned columns; columns that are empty everywhere are left out."""
    cells = [[str(value) for value in row] for row in rows]
    columns = [i for i in range(len(header)) if not cells or any(row[i] for row in cells)]
    widths = [max([len(header[i]), *(len(row[i]) for row in cells)]) for i in columns]
    lines = [
        [header[i] for i in columns],
        ["-" * width for width in widths],
        *([row[i] for i in columns] for row in cells),
    ]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
