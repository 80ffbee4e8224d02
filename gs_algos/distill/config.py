"""Defines the options of Distill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypedDict

from gs_algos.core.config import AlgorithmConfig

KINDS = ("mse", "attention", "kernel")
Pair: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class DistillConfig(AlgorithmConfig):
    """Options of Distill.

    Args:
        logits: weight of `temperature^2 * KL(teacher || student)` of the softened probabilities, mean over the rows.
        labels: weight of your own loss.
        temperature: what logits are divided by before the softmax, > 0.
        features: weight of the sum over `pairs`; 0 compares none.
        pairs: names of layers whose outputs are compared, `"layer3"` or `("student's", "teacher's")`; () takes the last
            block of each resolution that both networks have under the same name.
        kind: how outputs f of layers are compared: `mse`, mean squared error, through a learned 1x1 where the channels
            differ; `attention`, mean squared error of normalized maps of f^2, mean over the channels; `kernel`, mean
            squared error of standardized `exp(f / (2 s^2))` with learned s and 1x1.
        standardize: True compares logits of mean 0 and standard deviation 1 in each row.
        axis: of the classes in the logits; 1 for a segmentation of images.
        teacher_rows: inputs of the batch that the teacher sees at a time, so that its logits are never held whole;
            None: all of them.
        train_teacher: train the teacher at the same time, by your own loss on what it returns; nothing flows from the
            student to it. Its tensors are then tensors of the prepared network.
    """

    logits: float = 0.9
    labels: float = 0.1
    temperature: float = 4.0
    features: float = 0.0
    pairs: tuple[Pair, ...] = ()
    kind: str = "mse"
    standardize: bool = False
    axis: int = -1
    teacher_rows: int | None = None
    train_teacher: bool = False

    who: ClassVar[str] = "Distill"

    def __post_init__(self) -> None:
        for name in ("logits", "labels", "features"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Distill: {name} must be finite and >= 0, got {getattr(self, name)}")
        if not self.logits and not self.features:
            raise ValueError("Distill: logits or features must be > 0, got 0 for both; nothing would be distilled")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Distill: temperature must be finite and > 0, got {self.temperature}")
        if self.teacher_rows is not None and (self.teacher_rows < 1 or self.features):
            raise ValueError(
                "Distill: teacher_rows must be >= 1, and features 0, which need all rows at once, got "
                f"teacher_rows={self.teacher_rows}, features={self.features}"
            )
        if not isinstance(self.train_teacher, bool):
            raise ValueError(f"Distill: train_teacher must be True or False, got {self.train_teacher!r}")
        if self.train_teacher and self.teacher_rows is not None:
            raise ValueError(
                "Distill: teacher_rows must be None where the teacher is trained, which sees the whole batch, got "
                f"{self.teacher_rows}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"Distill: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.pairs, str):
            raise ValueError(f"Distill: pairs must be a list of names, got {self.pairs!r}; write [{self.pairs!r}]")
        pairs = tuple(pair if isinstance(pair, str) else tuple(pair) for pair in self.pairs)
        for pair in pairs:
            if not isinstance(pair, str) and (len(pair) != 2 or not all(isinstance(name, str) for name in pair)):
                raise ValueError(f"Distill: every pair must be a name, or (student's, teacher's), got {pair!r}")
        object.__setattr__(self, "pairs", pairs)
        if pairs and not self.features:
            raise ValueError(f"Distill: features must be > 0 where pairs are given, got features=0, pairs={pairs!r}")


class DistillOptions(TypedDict, total=False):
    """Types the fields of `DistillConfig` as keywords of `Distill`, for type checkers."""

    logits: float
    labels: float
    temperature: float
    features: float
    pairs: Sequence[Pair]
    kind: str
    standardize: bool
    axis: int
    teacher_rows: int | None
    train_teacher: bool
