"""Plans: what an algorithm is going to do to a model, layer by layer, before anything is touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import TypeVar

from gs_algos.core.modules import computed_by, parent_name
from gs_algos.core.plan_settings import RowSettings, settings_of
from gs_algos.core.table import Table
from gs_kernels.runtime.torch_private import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # their weights multiply element by element
ATTENTION_LINEAR = nn.modules.linear.NonDynamicallyQuantizableLinear
LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)  # one `weight` each


TEXTS = ("site", "kind", "action", "detail", "reason")
S = TypeVar("S", bound=RowSettings | None, default=Any)


@dataclass(frozen=True)
class PlanRow(Generic[S]):
    """Says what is done to one layer.

    Args:
        action: what will be done, or `keep` with the reason.
        settings: what `apply` needs to do it, and `load` to do it again; None if that is nothing.
    """

    site: str
    kind: str
    action: str
    detail: str = ""
    reason: str = ""
    settings: S = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.settings is not None and not isinstance(self.settings, RowSettings):
            got = type(self.settings).__name__
            raise TypeError(
                f"PlanRow: settings must be a frozen dataclass with gs_algos.RowSettings as its base, got {got}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as JSON has it."""
        settings = None if self.settings is None else self.settings.to_dict()
        return {**{name: getattr(self, name) for name in TEXTS}, "settings": settings}

    @staticmethod
    def fits(data: Any) -> bool:
        """Returns whether `data` has the fields of a row; its settings are not checked."""
        return (
            isinstance(data, dict)
            and data.keys() == {*TEXTS, "settings"}
            and all(isinstance(data[name], str) for name in TEXTS)
            and isinstance(data["settings"], dict | None)
        )


def rows_of(plan: Iterable[Mapping[str, Any]], forms: tuple[type[RowSettings], ...]) -> list[PlanRow]:
    """Reads the rows of a plan from a history entry.

    Args:
        forms: the classes that the algorithm has for the settings of its rows.

    Raises:
        ValueError: if the settings of a row are of none of them, or a row that acts has none.
    """
    rows: list[PlanRow] = []
    for row in plan:
        try:
            settings = settings_of(row["settings"], forms)
        except ValueError as error:
            raise ValueError(f"{error} of {row['site']}") from error
        if settings is None and forms and row["action"] != "keep":
            raise ValueError(f"settings must be there for what is not kept, got settings=None of {row['site']}")
        rows.append(PlanRow(**{name: row[name] for name in TEXTS}, settings=settings))
    return rows


def with_settings(entry: Mapping[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Returns a history entry with other settings in the rows of its plan, as a migration of a checkpoint does.

    change: gives the new settings of a row, whose `settings` are those of the file.
    """
    return {**entry, "plan": [{**row, "settings": change(row)} for row in entry["plan"]]}


@dataclass(frozen=True)
class Totals:
    """Counts the numbers and bytes of a model before and after a plan.

    Args:
        numbers: elements of all parameters, biases and norms included; a tied one counts once.
        quantized: those of them in weights that the plan quantizes.
        before: bytes of all parameters.
        after: bytes of what takes their place.
    """

    numbers: int
    quantized: int
    before: int
    after: int

    def __str__(self) -> str:
        share = 100 * self.quantized / max(1, self.numbers)
        return (
            f"weights: {self.quantized:,} of {self.numbers:,} numbers are quantized ({share:.1f} %), "
            f"{self.numbers - self.quantized:,} stay float ({100 - share:.1f} %); "
            f"{self.before:,} bytes before, {self.after:,} after"
        )


@dataclass(frozen=True)
class Plan:
    """Says what an algorithm is going to do: a row for each layer, the totals, and notes.

    `str(plan)` is a table with the totals below it, in a notebook one of HTML. A layer that is in many blocks is one
    line of it, with a count.

    Args:
        tracer: what read the graph of the network, or "" if nothing did.
    """

    algorithm: str
    tracer: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    totals: Totals | None = None

    @property
    def rung(self) -> str:
        """Deprecated: the old name of `tracer`."""
        warnings.warn(
            "Plan.rung is now Plan.tracer; the old name goes with the next minor version", DeprecationWarning, 2
        )
        return self.tracer

    def acted(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.action != "keep")

    def kept(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.action == "keep")

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        totals = None if self.totals is None else asdict(self.totals)
        return {
            "algorithm": self.algorithm,
            "tracer": self.tracer,
            "rows": rows,
            "notes": list(self.notes),
            "totals": totals,
        }

    def __str__(self) -> str:
        return self._table()

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        read = f", graph read by {self.tracer}" if self.tracer else ""
        totals = [] if self.totals is None else [str(self.totals)]
        return render_layers(
            ("layer", "kind", "action", "detail", "reason"),
            [(row.site, row.kind, row.action, row.detail, row.reason) for row in self.rows],
            f"{self.algorithm}: {len(self.acted())} of {len(self.rows)} layers{read}",
            [*(f"note: {note}" for note in self.notes), *totals],
        )


def other_weights(model: nn.Module, rows: Iterable[PlanRow]) -> list[PlanRow]:
    """Returns a `keep` row, with the reason, for every parameter with two or more axes that no row speaks of.

    A row speaks of the parameters that the module of its name holds itself, or of the parameter of that name. Weights
    of norms get no row: they multiply element by element.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    spoken = {id(parameter) for row in rows for parameter in _parameters_of(row, model, modules)}
    others: dict[str, PlanRow] = {}
    for name, parameter in model.named_parameters():
        owner_name = parent_name(name)
        owner = modules[owner_name]
        if parameter.dim() < 2 or id(parameter) in spoken or isinstance(owner, NORMS):
            continue
        if isinstance(owner, ParametrizationList):  # <layer>.parametrizations.<weight>.original
            owner_name, _, key = owner_name.rpartition(".parametrizations.")
            owner, name = modules[owner_name], f"{owner_name}.{key}" if owner_name else key
        while isinstance(owner, nn.ParameterList | nn.ParameterDict) and owner_name:
            owner_name = parent_name(owner_name)
            owner = modules[owner_name]
        site = owner_name if isinstance(owner, LAYERS) else name
        others.setdefault(site, PlanRow(site, type(owner).__name__, "keep", reason=_why_float(owner, parameter)))
    return list(others.values())


def totals_of(model: nn.Module, after: Mapping[str, int]) -> Totals:
    """Counts the totals of a plan.

    Args:
        after: name of a layer, or of a parameter, that is quantized -> bytes that its weight takes then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    every = {id(parameter): parameter for parameter in parameters.values()}
    taken = {}
    for name, nbytes in after.items():
        weight = modules[name]._parameters["weight"] if name in modules else parameters[name]
        taken[id(weight)] = nbytes
    before = {key: parameter.numel() * parameter.element_size() for key, parameter in every.items()}
    return Totals(
        numbers=sum(parameter.numel() for parameter in every.values()),
        quantized=sum(every[key].numel() for key in taken),
        before=sum(before.values()),
        after=sum({**before, **taken}.values()),
    )


def _parameters_of(row: PlanRow, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for name in {row.site, *(row.settings.other_names() if row.settings else ())}:
        if name in modules:
            parameters += modules[name].parameters(recurse=False)
            computed = getattr(modules[name], "parametrizations", None)
            parameters += computed.parameters() if isinstance(computed, nn.Module) else []
        else:
            own = modules.get(parent_name(name), nn.Module())._parameters.get(name.rpartition(".")[2])
            parameters += [] if own is None else [own]
    return parameters


def _why_float(owner: nn.Module, parameter: nn.Parameter) -> str:
    """Says why a parameter that no pattern knows stays float."""
    kind = type(owner).__name__
    if isinstance(owner, LAYERS) and (how := computed_by(owner)):
        return f"its weight is no parameter but comes from {how}; make it a plain weight first"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "is a table whose rows are looked up, not multiplied"
    if isinstance(owner, nn.MultiheadAttention | ATTENTION_LINEAR):
        return "is multiplied inside nn.MultiheadAttention, not by a layer"
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return "is a transposed convolution, which has no quantized form"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return f"is multiplied inside nn.{kind}, not by a layer"
    if parameter.dim() == 3 and parameter.shape[0] > 1:
        return f"is a stack of {parameter.shape[0]} matrices that the forward of {kind} reads itself"
    return f"is read by the forward of {kind} itself, not by a layer"


def render_layers(
    header: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", below: Sequence[str] = ()
) -> Table:
    """Renders a table of rows that start with a layer's name; equal rows of the same layer in many blocks become one.

    That row has `blocks.0.fc ... blocks.11.fc` as its name and says how many there are. A column `bytes` is of each.
    """
    groups: list[list[list[str]]] = []
    last: dict[str, tuple[str, ...]] = {}  # the row a name was last found with, numbers of blocks left out
    place: dict[str, int] = {}
    for row in rows:
        cells = [str(cell) for cell in row]
        name, rest = _BLOCK.sub("*", cells[0]), tuple(_without_numbers(cell) for cell in cells[1:])
        if "*" in name and last.get(name) == rest:
            groups[place[name]].append(cells)
            continue
        last[name], place[name] = rest, len(groups)
        groups.append([cells])
    if len(groups) == len(rows):
        return Table.of(header, rows, title, below)
    names = [group[0][0] if len(group) == 1 else f"{group[0][0]} ... {group[-1][0]}" for group in groups]
    counts = ["" if len(group) == 1 else str(len(group)) for group in groups]
    header = [f"{column} each" if column == "bytes" else column for column in header]
    table = [(name, n, *group[0][1:]) for name, n, group in zip(names, counts, groups, strict=True)]
    return Table.of((header[0], "count", *header[1:]), table, title, below)


_BLOCK = re.compile(r"(?:^|(?<=[._]))\d+(?=\.)")  # the number of a block in a name: layers.3.fc, experts.expert_3.fc
_NAME = re.compile(r"[\w.]*\.[\w.]*[A-Za-z_][\w.]*")


def _without_numbers(cell: str) -> str:
    """Returns the text of a cell without the numbers of blocks in its names."""
    return _NAME.sub(lambda found: _BLOCK.sub("*", found[0]), cell)
