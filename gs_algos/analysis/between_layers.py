"""Tells what time passes between the layers of a network, by shares of the network that have a form, and fits it.

Normalization that a converted layer takes over, codes that are handed on, calls that run as recorded: all of it depends
on the forms of the layers around. Networks with random forms are timed, and few numbers are fitted to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from gs_algos.analysis.layer_forms import FLOAT, on_grid

READ_AS_FLOATS = "codes read as floats"  # outputs of layers on a grid that are followed by one that reads floats
CALLS = {True: "calls on a grid", False: "calls of weights alone"}
ROUNDED = "floats read as codes"  # outputs of other layers that are followed by one on a grid
FLOATS = "calls of floats beside others"  # which run as recorded, as those of a float network do not
MIXED = (READ_AS_FLOATS, ROUNDED, *CALLS.values(), FLOATS)
TRUST = 0.1  # in what is known of networks with one form: the weight of its relative error beside that of a network
STRANGE = 0.05  # relative error from which a network counts less: something else ran beside it
ROUNDS = 5


def shares(
    policy: Mapping[str, str], weights: Mapping[str, int], having: Callable[[str], Sequence[str]]
) -> dict[str, float]:
    """Returns which share of the layers with a choice, by their outputs, has it; and the shares of mixed networks.

    Args:
        policy: layer -> choice; others are float.
        weights: layer -> elements of its outputs, in the order they run.
        having: gives the layers that can have a choice.
    """
    found: dict[str, float] = {}
    followers = dict(zip(weights, [*weights, None][1:], strict=True))

    def outputs(names: Iterable[str]) -> int:
        return sum(weights[name] for name in names)

    for choice in dict.fromkeys(policy.values()):
        if choice == FLOAT:
            continue
        mine = [name for name in weights if policy.get(name) == choice]
        uniform = dict.fromkeys(having(choice), choice)
        handing = [name for name in mine if _hands_on(choice, followers[name], policy)]
        whole = outputs(name for name in uniform if _hands_on(choice, followers[name], uniform))
        found[choice] = outputs(handing) / (whole or 1)
        calls = CALLS[on_grid(choice)]
        found[calls] = found.get(calls, 0.0) + len(mine) / len(weights)
        read = (outputs(mine) - outputs(handing)) / (outputs(weights) or 1)
        found[READ_AS_FLOATS] = found.get(READ_AS_FLOATS, 0.0) + read
    if found:
        found[FLOATS] = sum(policy.get(name, FLOAT) == FLOAT for name in weights) / len(weights)
        rounded = [name for name, after in followers.items() if not _on_grid(policy, name) and _on_grid(policy, after)]
        found[ROUNDED] = outputs(rounded) / (outputs(weights) or 1)
    return found


def _hands_on(choice: str, after: str | None, policy: Mapping[str, str]) -> bool:
    """Says whether a layer saves the time that it saves in a network of its choice alone."""
    return not on_grid(choice) or after is None or _on_grid(policy, after)


def _on_grid(policy: Mapping[str, str], name: str | None) -> bool:
    choice = FLOAT if name is None else policy.get(name, FLOAT)
    return choice != FLOAT and on_grid(choice)


def fit(
    found: Sequence[Mapping[str, float]],
    known: Mapping[str, float],
    missing_ms: Sequence[float],
    whole: Sequence[float],
) -> dict[str, float]:
    """Fits ms by share to networks, near what is known: least squares of relative errors.

    Args:
        found: `shares` of each network.
        known: what is known of networks of one choice: choice -> ms.
        missing_ms: of each network what its layers do not explain.
        whole: ms of each network.
    """
    keys = [*known, *MIXED]
    start = torch.tensor([known.get(key, 0.0) for key in keys], dtype=torch.float64)
    x = torch.tensor([[row.get(key, 0.0) for key in keys] for row in found], dtype=torch.float64).view(-1, len(keys))
    y, ms = (torch.tensor(values, dtype=torch.float64) for values in (missing_ms, whole))
    if not len(y):
        return dict(zip(keys, start.tolist(), strict=True))
    x, y = x / ms[:, None], y / ms
    trust = TRUST * torch.eye(len(keys), dtype=torch.float64) / ms.mean()
    fitted, weight = start, torch.ones_like(y)
    for _ in range(ROUNDS):
        left = torch.cat([x * weight[:, None], trust])
        right = torch.cat([y * weight, trust @ start])
        fitted = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        weight = (STRANGE / (x @ fitted - y).abs()).clamp(max=1).sqrt()
    return dict(zip(keys, fitted.tolist(), strict=True))
