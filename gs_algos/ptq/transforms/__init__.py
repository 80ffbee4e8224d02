"""Makes weights easier to round without changing the float network: every way has an entry in `TRANSFORMS`.

A transform of a stage gives scales `[K]` of the tensor `x` that its layers read: the layer before returns `x / scale`
then, and the weights that read it are `W * scale`. They are tried in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.ptq.transforms.awq import awq
from gs_algos.ptq.transforms.columns import StageColumns
from gs_algos.ptq.transforms.smooth import smooth

Candidates: TypeAlias = dict[str, Tensor]  # what it is called -> scale [K]


@dataclass(frozen=True)
class Transform:
    """Describes one way to scale the input of a stage.

    Args:
        candidates: gives the scales to choose from, by the columns of the stage and the number that was asked for.
        by_block: whether the error of the block's output chooses, not that of the smallest module with all layers.
        takes_number: whether `name=number`, 0 to 1, may be asked for.
    """

    candidates: Callable[[StageColumns, float | None], Candidates]
    by_block: bool
    takes_number: bool


TRANSFORMS: Mapping[str, Transform] = {
    "smooth": Transform(smooth, by_block=True, takes_number=True),
    "awq": Transform(awq, by_block=False, takes_number=False),
}


@dataclass(frozen=True)
class ChosenTransform:
    """Holds one transform that was asked for. number: None if none was."""

    name: str
    number: float | None

    @property
    def transform(self) -> Transform:
        return TRANSFORMS[self.name]


def chosen_transforms(texts: Sequence[str], who: str = "PTQ") -> list[ChosenTransform]:
    """Parses `("awq", "smooth=0.85")`; returns them in the order they run in.

    Raises:
        TypeError: if it is no sequence of texts.
        ValueError: if a text is no transform, or names one again.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{who}: transforms must be a tuple of texts, got {texts!r}")
    found: dict[str, ChosenTransform] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if name not in TRANSFORMS:
            near = did_you_mean(name, TRANSFORMS)
            raise ValueError(f"{who}: transforms must be of {', '.join(TRANSFORMS)}, got {text!r}{near}")
        if name in found:
            raise ValueError(f"{who}: each of the transforms must be named once, got {name} again")
        found[name] = ChosenTransform(name, _number(text, number, who) if equals else None)
    return [found[name] for name in TRANSFORMS if name in found]


def _number(text: str, number: str, who: str) -> float:
    name = text.partition("=")[0]
    if not TRANSFORMS[name].takes_number:
        raise ValueError(f"{who}: {name} takes no number, got {text!r}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"{who}: {name} must be {name} or {name}=<0 to 1>, got {text!r}")
    return value
