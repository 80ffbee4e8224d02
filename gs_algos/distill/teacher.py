"""Checks a teacher against its student on example inputs: equal logits, finite, and layers that can be compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, InputsError, run
from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.core.network import network_of
from gs_algos.core.untouched import untouched
from gs_algos.distill.config import DistillConfig
from gs_algos.distill.losses import channel_axis
from gs_algos.distill.recorder import feature_of, recording

Pairs = tuple[tuple[str, str], ...]


def teacher_from(network: nn.Module, trained: bool = False) -> nn.Module:
    """Returns a copy of a network as its teacher: frozen and in eval mode, or one that is trained as the network is."""
    teacher = copy.deepcopy(network)
    if not trained:
        teacher.eval().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.grad = None
    return teacher


def logits_of(output: Any, who: str) -> Tensor:
    """Returns the logits in what a network returned: a tensor, `.logits`, `["logits"]`, or the first of a tuple.

    Raises:
        TypeError: if there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        shape = list(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(f"{who}: the network must return logits [B, classes], got {shape}")
    return found


def check_teacher(
    config: DistillConfig, student: nn.Module, teacher: nn.Module | None, inputs: Inputs, who: str
) -> tuple[Pairs, dict[str, tuple[int, int]]]:
    """Runs both on example inputs and leaves both as they were. teacher: None is the student as it is now.

    Returns:
        The pairs of layers that are compared, and (student's, teacher's) channels by the student's layer.

    Raises:
        ValueError: if the teacher is the student or shares parameters with it, is not finite, gives logits of another
            shape, or lacks a named layer, or the student does, or two outputs are of different sizes.
        TypeError: if the teacher is no module, or one of them returns no logits.
    """
    if teacher is not None:
        _refuse_shared(student, teacher, who)
    network = student if teacher is None else network_of(teacher, who)
    _refuse_nonfinite(network, who)
    sites = [name for name, module in student.named_modules() if name and _may_be_named(config, name, module)]
    theirs_sites = sites
    pairs: Pairs = tuple((pair, pair) if isinstance(pair, str) else pair for pair in config.pairs)
    if pairs:
        sites = _named(student, [own for own, _ in pairs], f"{who}: the student")
        theirs_sites = _named(network, [theirs for _, theirs in pairs], f"{who}: the teacher")
    elif teacher is not None:
        names = dict(network.named_modules())
        theirs_sites = sites = [site for site in sites if site in names]
    own_output, own = _outputs(student, inputs, sites, who)
    if teacher is None:
        output, theirs = own_output, own
    else:
        try:
            output, theirs = _outputs(network, inputs, theirs_sites, who)
        except InputsError as error:
            text = error.text.replace("through the model", "through the teacher", 1)
            raise ValueError(f"{who}: {text}") from error
    logits, teacher_logits = logits_of(own_output, who), logits_of(output, f"{who}: teacher")
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{who}: the teacher must give logits of the student's shape, {list(logits.shape)}, got "
            f"{list(teacher_logits.shape)}; give one that was trained for the same classes"
        )
    if not teacher_logits.isfinite().all():
        raise ValueError(f"{who}: the teacher must give finite logits, got nan or infinity on the example inputs")
    if not config.features:
        return (), {}
    if not pairs:
        pairs = tuple((site, site) for site in _stage_ends(own, theirs, logits))
        if not pairs:
            raise ValueError(
                f"{who}: student and teacher must have layers of equal names and sizes to compare, got none; name them "
                "in pairs"
            )
    return pairs, {mine: _channels(config, mine, own[mine], other, theirs[other], who) for mine, other in pairs}


def _may_be_named(config: DistillConfig, name: str, module: nn.Module) -> bool:
    """Returns whether a module may be the end of a stage: one that holds others."""
    return bool(config.features) and not config.pairs and bool(module._modules)


def _outputs(model: nn.Module, inputs: Inputs, sites: Iterable[str], who: str) -> tuple[Any, dict[str, Any]]:
    """Returns what a model gives in eval mode, and what its layers return, in the order in which they end."""
    with recording(model, sites) as recorder, untouched(model):
        output = run(model, inputs, who)
        return output, dict(recorder.features)


def _stage_ends(own: dict[str, Any], theirs: dict[str, Any], logits: Tensor) -> list[str]:
    """Returns the last layer of each size of its output, in both networks at once."""
    last: dict[tuple[int, ...], str] = {}
    mine: Any
    other: Any
    for site, output in own.items():
        mine, other = (
            found[0] if isinstance(found, tuple) and found else found for found in (output, theirs.get(site))
        )
        if not all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 2 for t in (mine, other)):
            continue
        size = _positions(mine)
        if size == _positions(other) and mine.shape != logits.shape:
            last.pop(size, None)
            last[size] = site
    return list(last.values())


def _positions(feature: Tensor) -> tuple[int, ...]:
    """Returns the shape without the channels."""
    axis = channel_axis(feature)
    return tuple(size for i, size in enumerate(feature.shape) if i != axis)


def _channels(config: DistillConfig, site: str, own: Any, other_site: str, other: Any, who: str) -> tuple[int, int]:
    own, other = feature_of(own, site, who), feature_of(other, other_site, f"{who}: teacher")
    if _positions(own) != _positions(other):
        raise ValueError(
            f"{who}: paired layers must have outputs of one size, got {list(own.shape)} from the student's {site} and "
            f"{list(other.shape)} from the teacher's {other_site}; name another pair"
        )
    if config.kind == "attention" and own.dim() < 3:
        raise ValueError(
            f"{who}: kind attention must compare outputs with positions, got {list(own.shape)} from {site}; name "
            "another layer, or use kind='mse'"
        )
    return own.shape[channel_axis(own)], other.shape[channel_axis(other)]


def _named(model: nn.Module, sites: list[str], who: str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for site in sites:
        if site not in names:
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{who} must have the layers that pairs name, got {site!r}, it has {some}{did_you_mean(site, names)}"
            )
    return sites


def _refuse_shared(student: nn.Module, teacher: Any, who: str) -> None:
    own = {id(p) for p in student.parameters()}
    if any(id(p) in own for p in network_of(teacher, f"{who}: teacher").parameters()):
        raise ValueError(
            f"{who}: the teacher must be another network than the student, got one with parameters of the student; "
            "leave teacher out for a copy of the student as it is now"
        )


def _refuse_nonfinite(network: nn.Module, who: str) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{who}: the teacher must be finite, got nan or infinity in {name}")
