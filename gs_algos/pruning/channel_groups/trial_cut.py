"""Tries cuts: checks that a network runs, and computes the same, with one unit of a group gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run, split_inputs
from gs_algos.core.compare import relative_error
from gs_algos.core.untouched import untouched
from gs_algos.pruning.channel_groups.groups import Groups, tensors_by_name
from gs_algos.pruning.channel_groups.trace import answers_of
from gs_algos.pruning.cut import _replace, cut, picks_of, zeroed

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-3  # RMS of the difference over RMS of the masked output; a wrong cut is off by far more


def failures(model: nn.Module, groups: Groups, example_inputs: Inputs) -> dict[int, str]:
    """Returns index of a group -> why its cut network fails; empty if all can be cut. The model is as it was after."""
    candidates = [i for i, group in enumerate(groups.groups) if group.n]
    candidates.sort(key=lambda i: max(groups.groups[i].widths))  # heads last: what fails, fails together
    return _search(model, groups, candidates, example_inputs) if candidates else {}


def _search(model: nn.Module, groups: Groups, candidates: Sequence[int], inputs: Inputs) -> dict[int, str]:
    """Tries all candidates at once, and halves of them if that fails."""
    reason = _try(model, groups, candidates, inputs)
    if reason is None:
        return {}
    if len(candidates) == 1:
        return {candidates[0]: reason}
    half = len(candidates) // 2
    bad = {
        **_search(model, groups, candidates[:half], inputs),
        **_search(model, groups, candidates[half:], inputs),
    }
    return bad or {i: f"{reason} (together with {len(candidates) - 1} other groups)" for i in candidates}


def _try(model: nn.Module, groups: Groups, candidates: Sequence[int], inputs: Inputs) -> str | None:
    """Says why the network with one unit of each candidate gone is not the masked one; None if it is."""
    keep = groups.everything()
    for i in candidates:
        group = groups.groups[i]
        keep[group.first + (3 * i + 1) % group.n] = False  # not the same place in two groups that should be one
    try:
        got = _outputs(model, groups, keep, inputs, masked=False)
    except Exception as error:  # noqa: BLE001  the user's code may raise anything at another size
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"has its size written into the model's code: {line}"
    want = _outputs(model, groups, keep, inputs, masked=True)
    for g, w in zip(got, want, strict=False):
        if g.shape != w.shape:
            return f"changes the output from {list(w.shape)} to {list(g.shape)}"
        difference = float((g.double() - w.double()).square().mean().sqrt())
        size = float(w.double().square().mean().sqrt())
        if w.isfinite().all() and not difference <= TOLERANCE * max(size, 1e-30):
            return f"is scaled by its size in the model's code: the cut network differs by {difference / size:.2g}"
    return None


def _outputs(model: nn.Module, groups: Groups, keep: Tensor, inputs: Inputs, masked: bool) -> list[Tensor]:
    with untouched(model):
        if masked:
            named = tensors_by_name(model)
            for name, picks in picks_of(groups, keep).items():
                if isinstance(named[name], nn.Parameter):
                    _replace(model, named[name], zeroed(named[name], picks))
        else:
            cut(model, groups, keep, fresh=True)
        args, kwargs = split_inputs(inputs)
        return [t.clone() for t in answers_of(model(*args, **kwargs)) if t.is_floating_point()]


def compared(who: str, model: nn.Module, groups: Groups, keep: Tensor, example_inputs: Inputs) -> float:
    """Returns the relative RMS of the cut network's outputs against the masked one's, the worst of all.

    Raises:
        RuntimeError: if it is more than rounding.
    """
    with evaluating(model):
        want = [t.clone() for t in answers_of(run(model, example_inputs, who)) if t.is_floating_point()]
    with untouched(model):
        cut(model, groups, keep, fresh=True)
        got = [t for t in answers_of(run(model, example_inputs, who)) if t.is_floating_point()]
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        error = relative_error(g, w)
        bound = ROUNDING.get(w.dtype, 0.0)
        if not error <= bound:
            raise RuntimeError(f"{who}: the cut network must give the masked outputs within {bound:g}, got {error:.3g}")
        worst = max(worst, error)
    return worst
