"""Makes weights easier to round without changing the float network: every way has an entry in `TRANSFORMS`.

They run in the order of the table. A transform of a stage gives scales `[K]` of the tensor `x` that its layers read:
the layer before returns `x / scale` then, and the weights that read it are `W * scale`. The last of them may shift it,
too: the layer before returns `x / scale - shift`, and biases of the layers that read it grow by `W * scale * shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs
from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.ptq.transforms.awq import awq
from gs_algos.ptq.transforms.columns import StageColumns
from gs_algos.ptq.transforms.equalize import equalize, find_chains
from gs_algos.ptq.transforms.relayernorm import middle, relayernorm
from gs_algos.ptq.transforms.rotate import find_rotated, rotate
from gs_algos.ptq.transforms.smooth import smooth

Candidates: TypeAlias = dict[str, Tensor]  # what it is called -> scale [K]


@dataclass(frozen=True)
class NetworkTransform:
    """Describes a change of the whole float network, without data, before anything is rounded.

    Args:
        find: returns the names of the layers that go together, once some batch norms are folded.
        run: changes the live network, and returns what `find` did.
    """

    find: Callable[[nn.Module, Inputs, Collection[str]], list[tuple[str, ...]]]
    run: Callable[[nn.Module, Inputs, str], list[tuple[str, ...]]]
    takes_number: bool = False


@dataclass(frozen=True)
class StageTransform:
    """Describes one way to scale the input of a stage.

    Args:
        candidates: gives the scales to choose from, by the columns of the stage and the number that was asked for.
        by_block: whether the error of the block's output chooses, not that of the smallest module with all layers.
        takes_number: whether `name=number`, 0 to 1, may be asked for.
        norms: whether only a norm can take the scale back.
        shift: gives what is taken off the scaled input `[K]`, where biases can take it back.
    """

    candidates: Callable[[StageColumns, float | None], Candidates]
    by_block: bool
    takes_number: bool
    norms: bool = False
    shift: Callable[[StageColumns, Tensor], Tensor] | None = None


Transform: TypeAlias = NetworkTransform | StageTransform
TRANSFORMS: Mapping[str, Transform] = {
    "equalize": NetworkTransform(find_chains, equalize),
    "rotate": NetworkTransform(find_rotated, rotate),
    "smooth": StageTransform(smooth, by_block=True, takes_number=True),
    "awq": StageTransform(awq, by_block=False, takes_number=False),
    "relayernorm": StageTransform(relayernorm, by_block=True, takes_number=False, norms=True, shift=middle),
}


def network_transforms(texts: Sequence[str]) -> dict[str, NetworkTransform]:
    """Returns those of `chosen_transforms` that change the network, by name."""
    chosen = {name: TRANSFORMS[name] for name in chosen_transforms(texts)}
    return {name: one for name, one in chosen.items() if isinstance(one, NetworkTransform)}


def stage_transforms(texts: Sequence[str]) -> dict[str, tuple[StageTransform, float | None]]:
    """Returns those of `chosen_transforms` that scale the input of a stage, by name, with their numbers."""
    chosen = {name: (TRANSFORMS[name], number) for name, number in chosen_transforms(texts).items()}
    return {name: (one, number) for name, (one, number) in chosen.items() if isinstance(one, StageTransform)}


def chosen_transforms(texts: Sequence[str], who: str = "PTQ") -> dict[str, float | None]:
    """Parses `("awq", "smooth=0.85")`; returns name -> number, or None, in the order they run in.

    Raises:
        TypeError: if it is no sequence of texts.
        ValueError: if a text is no transform, or names one again.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{who}: transforms must be a tuple of texts, got {texts!r}")
    found: dict[str, float | None] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if name not in TRANSFORMS:
            near = did_you_mean(name, TRANSFORMS)
            raise ValueError(f"{who}: transforms must be of {', '.join(TRANSFORMS)}, got {text!r}{near}")
        if name in found:
            raise ValueError(f"{who}: each of the transforms must be named once, got {name} again")
        found[name] = _number(text, number, who) if equals else None
    return {name: found[name] for name in TRANSFORMS if name in found}


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
