"""Defines the options of SLB."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypedDict

import torch

from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule
from gs_algos.qat.slb.pact import parse_act
from gs_algos.qat.slb.prepare import SearchOptions
from gs_algos.qat.slb.schedule import T_FINAL, Schedule
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.scheme import Scheme, as_text, check_rules, join_scheme

CHOICES = {"init": ("weights", "random"), "batch_norm": ("plain", "state"), "logits": ("float32", "bfloat16")}
# options of published recipes, for SLB(**SCHEDULES["..."], total_steps=..., steps_per_epoch=...)
SCHEDULES: dict[str, dict[str, Any]] = {
    "golden-stick-cifar10": {"t0": 1.0, "t_start": 0.2, "t_end": 0.6, "t_factor": 1.2},
    "golden-stick-imagenet": {"t0": 1.0, "t_start": 0.4, "t_end": 0.9, "t_factor": 1.12},
    "authors-cifar10": {"t0": 1.0, "t_start": 0.3, "t_end": 0.9, "t_factor": 1.05},
}


@dataclass(frozen=True)
class SLBConfig(AlgorithmConfig):
    """Options of SLB.

    Args:
        weight: grid of the weights: a `LevelGrid`, a `Scheme`, or text, which is what the config keeps. As a scheme
            `int1|int2|int4|int8@tensor|@channel`, or in SLB's own words `2bit@channel`: evenly spaced levels from -1
            to 1 times a scale, fixed at the least error; `:lsq`, or `:learned`, trains the scale. `1bit`, `2bit`, ...
            have no scale and need a batch norm behind the layer.
        act: scheme of the activations that a layer reads, as in SimQAT, or with a learned bound `uint4@tensor:pact`.
        total_steps: optimizer steps of the whole training; needed by `apply`.
        steps_per_epoch: the temperature moves once in so many steps; 1 moves it every step.
        t0: T = 1 / temperature at the start.
        t_start: share of total_steps from which T rises.
        t_end: share of total_steps from which the codes are chosen: weights stand, all else trains on.
        t_factor: T rises by this factor each epoch; None: by what leads to t_final at t_end.
        t_final: T at t_end, if t_factor is None.
        init: where logits start: `weights`, near the levels that lie near the live weights, or `random`.
        kappa: `A_k = -kappa * (w / c - v_k)**2` for `weights`; None: such that the mixture starts at the weights.
        batch_norm: `plain`, or `state`: running statistics are those of the quantized weights, at one more forward of
            each layer that a batch norm follows. `calibrate_norms` is the other way.
        ends: grid of the first and the last layer that run: "same", another, or None for float. Rules go before.
        logits: "float32", or "bfloat16": half the memory, for optimizers whose steps it does not round away.
        fused: train the logits with `SlbAdamW` or `SlbSGD` (gs_algos.qat.slb.optim); the layers then keep a parameter
            `weight`, the mixture, whose gradient those read.
        trace: points of the training at which gap and confidence of each layer are kept for `picture`.
        rules: `(pattern, {"weight": ..., "act": ..., "fused": ...} | None)`; None leaves the layer float.
    """

    weight: str | Scheme | LevelGrid = "4bit@channel"
    act: str | Scheme | None = None
    total_steps: int | None = None
    steps_per_epoch: int = 1
    t0: float = 1.0
    t_start: float = 0.2
    t_end: float = 0.6
    t_factor: float | None = None
    t_final: float = T_FINAL
    init: str = "weights"
    kappa: float | None = None
    batch_norm: str = "plain"
    ends: str | Scheme | LevelGrid | None = "same"
    logits: str = "float32"
    fused: bool = False
    trace: int = 50
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "SLB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", str(LevelGrid.parse(self.weight)))
        if self.ends not in (None, "same"):
            object.__setattr__(self, "ends", str(LevelGrid.parse(self.ends)))
        parse_act(self.act)
        if isinstance(self.act, Scheme):
            object.__setattr__(self, "act", str(self.act))
        check_rules(self.rules, "SLB", {"weight": LevelGrid.parse, "act": parse_act, "join": join_scheme})
        object.__setattr__(self, "rules", as_text(self.rules, (Scheme, LevelGrid)))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"SLB: {name} must be one of {', '.join(choices)}, got {value!r}")
        for name, right, must in self._claims():
            if not right:
                raise ValueError(f"SLB: {name} must be {must}, got {getattr(self, name)!r}")

    def _claims(self) -> Iterator[tuple[str, bool, str]]:
        """Yields (option, whether it holds, what must hold)."""
        yield "total_steps", self.total_steps is None or _whole(self.total_steps, 1), "a number of steps >= 1"
        yield "steps_per_epoch", _whole(self.steps_per_epoch, 1), "a number of steps >= 1"
        yield "t0", _positive(self.t0), "a number > 0"
        yield "t_start", 0 <= self.t_start <= 1, "a share of the steps, in [0, 1]"
        yield "t_end", self.t_start <= self.t_end <= 1, f"a share of the steps, in [t_start, 1] = [{self.t_start:g}, 1]"
        yield "t_factor", self.t_factor is None or _positive(self.t_factor), "a number > 0"
        yield "t_final", _positive(self.t_final), "a number > 0"
        yield "kappa", self.kappa is None or _positive(self.kappa), "a number > 0"
        yield "trace", _whole(self.trace, 0), "a number of points >= 0"

    def schedule(self) -> Schedule:
        names = [field.name for field in fields(Schedule)]
        return Schedule(**{name: getattr(self, name) for name in names})

    def options(self) -> SearchOptions:
        return SearchOptions(
            weight=str(self.weight),
            act=None if self.act is None else str(self.act),
            ends=None if self.ends is None else str(self.ends),
            fused=self.fused,
            state_bn=self.batch_norm == "state",
            rules=self.rules,
            total_steps=self.total_steps or 0,
            points=self.trace,
            logits_dtype=getattr(torch, self.logits),
        )


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


class SLBOptions(TypedDict, total=False):
    """Types the fields of `SLBConfig` as keywords of `SLB`, for type checkers."""

    weight: str | Scheme | LevelGrid
    act: str | Scheme | None
    total_steps: int | None
    steps_per_epoch: int
    t0: float
    t_start: float
    t_end: float
    t_factor: float | None
    t_final: float
    init: str
    kappa: float | None
    batch_norm: str
    ends: str | Scheme | LevelGrid | None
    logits: str
    fused: bool
    trace: int
    rules: Sequence[Rule]
