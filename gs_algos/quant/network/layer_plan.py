"""Defines the settings of each layer and add in plans of SimQAT and SLB, in the model's history and in checkpoints.

`plan` writes what the options and the graph say. `convert` makes a new plan, which also says what the converted layer
does in its own call and whether its output is int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gs_algos.core.plan import PlanRow, with_settings
from gs_algos.core.plan_settings import Record, RowSettings


@dataclass(frozen=True)
class Epilogue(Record):
    """Names what runs behind a layer, read by nothing else, so that the converted layer can compute it in its own call.

    Args:
        activation: name of the module; once converted None unless the layer does its work.
        op: what that module computes, e.g. "relu"; set by `convert`, which puts an Identity in place of the module.
        adds: whether an add reads the output.
        returned: whether the network returns that sum, which then must be there.
        defers_add: whether the converted layer waits for that add, and does it.
        reason: why an activation or an add that reads the output is not done; "" if all is, or if there is none.
    """

    activation: str | None = None
    op: str | None = None
    adds: bool = False
    returned: bool = False
    defers_add: bool = False
    reason: str = ""


@dataclass(frozen=True)
class IntegerFlow(Record):
    """Says in which form a converted layer returns its output.

    Args:
        consumers_accept: whether all that reads the output can be computed from int8; the graph says it.
        to_consumers: whether it is int8 on the grid that the consumers share.
        to_own_grid: whether it is int8 on the layer's own output grid, which an add shares.
        as_it_lies: whether floats keep the strides they were computed in: all consumers are packed layers.
    """

    consumers_accept: bool = False
    to_consumers: bool = False
    to_own_grid: bool = False
    as_it_lies: bool = False


@dataclass(frozen=True)
class LayerPlan(RowSettings):
    """Holds the plan of one layer whose weight is quantized or searched.

    Args:
        weight: its scheme, or the grid of its levels.
        act: the scheme of its activation; None: float.
        bn: the batch norm that is folded into it.
        norm_children: modules inside that batch norm that run behind it.
        shape: of the weight; empty where a checkpoint of version 1 has not kept it.
        fold: how SimQAT treats the batch norm in training; None: there is none.
        fused_optimizer: whether SlbAdamW or SlbSGD trains the logits.
        epilogue: what runs behind it.
        consumers: the planned layers that alone read the output, with only what commutes with rounding between.
        flow: the form of the output.
        notes: why the converted layer does no more in its call.
    """

    form: ClassVar[str] = "layer"

    weight: str
    act: str | None
    bn: str | None
    norm_children: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    fold: str | None = None
    fused_optimizer: bool = False
    epilogue: Epilogue = Epilogue()
    consumers: tuple[str, ...] = ()
    flow: IntegerFlow = IntegerFlow()
    notes: tuple[str, ...] = ()

    @property
    def fused_activation(self) -> str | None:
        """Names the activation that the converted layer computes."""
        return None if self.epilogue.op is None else self.epilogue.activation


@dataclass(frozen=True)
class JoinPlan(RowSettings):
    """Holds the plan of an add or concat whose operands share one scale.

    Args:
        operands: the modules that give them.
        act: the scheme of what they give.
        int8_inputs: those that may give int8, since all that reads them can be computed from it.
    """

    form: ClassVar[str] = "join"

    operands: tuple[str, ...]
    act: str
    int8_inputs: tuple[str, ...] = ()


FORMS: tuple[type[RowSettings], ...] = (LayerPlan, JoinPlan)


def layer_rows(rows: Iterable[PlanRow]) -> list[PlanRow[LayerPlan]]:
    """Returns the rows of the layers that are quantized or searched."""
    return [row for row in rows if isinstance(row.settings, LayerPlan)]


def join_rows(rows: Iterable[PlanRow]) -> list[PlanRow[JoinPlan]]:
    """Returns the rows of the adds and concats with one scale."""
    return [row for row in rows if isinstance(row.settings, JoinPlan)]


# old key -> (field, or record and field)
LAYER_KEYS: Mapping[str, tuple[str, ...]] = {
    **{key: (key,) for key in ("weight", "act", "bn", "fold", "shape", "fused_optimizer", "notes")},
    "tail": ("norm_children",),
    "readers": ("consumers",),
    "defers": ("epilogue", "defers_add"),
    "takes_codes": ("flow", "consumers_accept"),
    "hands_codes": ("flow", "to_consumers"),
    "hands_own": ("flow", "to_own_grid"),
    "hands_values": ("flow", "as_it_lies"),
}
JOIN_KEYS: Mapping[str, tuple[str, ...]] = {"operands": ("operands",), "act": ("act",), "take_codes": ("int8_inputs",)}


def from_version_1(entry: dict[str, Any]) -> dict[str, Any]:
    """Translates a history entry of a checkpoint of version 1 to version 2.

    There `fused` of a search said whether a fused optimizer trains the layer, until `convert` wrote over it the
    activation that the layer takes over, as it did in SimQAT. A `convert` that was refused did so too, and lost the
    first: the option for all layers stands in for it.
    """
    converted = entry["stage"] == "converted"

    def change(row: dict[str, Any]) -> Any:
        old = row["settings"]
        if not old:
            return None
        if "operands" in old:
            return _renamed({"form": JoinPlan.form}, old, JOIN_KEYS)
        follows = old.get("follows", {})
        if not isinstance(follows, dict):
            raise ValueError(f"follows must be an object, got follows={follows!r:.60} of {row['site']}")
        fused = old.get("fused")
        start: dict[str, Any] = {"form": LayerPlan.form, "epilogue": dict(follows), "flow": {}}
        if converted:
            pair = fused if isinstance(fused, list) and len(fused) == 2 else [None, None]
            if fused is not None and not isinstance(fused, bool) and pair is not fused:
                raise ValueError(f"fused must be a module and its operation, got fused={fused!r:.60} of {row['site']}")
            start["epilogue"] |= {"activation": pair[0], "op": pair[1]}
        if entry["algorithm"] == "slb" and "fused_optimizer" not in old:
            start["fused_optimizer"] = fused if isinstance(fused, bool) else bool(entry["config"].get("fused"))
        return _renamed(
            start, {key: value for key, value in old.items() if key not in ("fused", "follows")}, LAYER_KEYS
        )

    return with_settings(entry, change)


def _renamed(start: dict[str, Any], old: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Adds the old settings to `start` under their new names; unknown ones keep theirs, and are refused later."""
    for key, value in old.items():
        *inside, name = keys.get(key, (key,))
        target = start[inside[0]] if inside else start
        target[name] = value
    return start
