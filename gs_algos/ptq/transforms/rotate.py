"""Rotates the residual stream and what linears read, so that outliers of single channels are spread over all.

QuaRot: Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant: Liu et al. 2024, arXiv:2405.16406. Gains of norms go into the
linears that read them; the basis of the stream becomes that of a Hadamard matrix with random signs. Values, head by
head, get a rotation that the output projection takes back; what other writers read is rotated as it runs.

Differs from the papers: where norms take the mean away, the rotation leaves the mean as it is, so that they stay what
they are. A shared embedding stays shared: the stream is rotated behind it, and back before the last norm.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import Inputs, evaluating, run
from gs_algos.core.compare import relative_error
from gs_algos.core.mapped_files import in_file
from gs_algos.ptq.blocks import first_tensor
from gs_algos.ptq.streams import stop, stopped, without_cache
from gs_algos.ptq.transforms.producer import restored
from gs_algos.ptq.transforms.residual import (
    LEAST,
    OUT,
    TOLERANCE,
    Residual,
    ResidualNorm,
    find_residual,
    is_linear,
    without_gain,
)
from gs_algos.quant.packed.packable import matrix_of
from gs_algos.quant.rotation import Rotation, install_rotation
from gs_kernels import hadamard, hadamard_block


@dataclass(frozen=True)
class ValueRows:
    """Names rows of a linear that the output projection reads after they were mixed over tokens only.

    start: of the rows in the weight; they go to its end. block: channels that are rotated together, at most a head.
    """

    linear: str
    start: int
    block: int


def find_rotated(model: nn.Module, example_inputs: Inputs, _: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Says what `rotate` would change; touches nothing.

    Raises:
        ValueError: as `rotate`.
    """
    residual = find_residual(model, example_inputs, "PTQ.plan")
    return _told(residual)


def rotate(model: nn.Module, example_inputs: Inputs, who: str = "rotate") -> list[tuple[str, ...]]:
    """Rotates the live network, which computes the same afterwards; returns what was found.

    Raises:
        ValueError: if its residual stream cannot be found, something else than linears behind norms reads it, or the
            network's output is another one afterwards. The network is then as it was.
    """
    residual = find_residual(model, example_inputs, who)
    with evaluating(model), without_cache(model):
        want = first_tensor(run(model, example_inputs, who))
        with _undone_on_error(model) as handles:
            pairs = _pairs(model, example_inputs, residual, who)
            _rotate_residual(model, residual, handles)
            for writer in residual.writers:
                _rotate_input(model, writer, pairs.get(writer), handles)
            got = first_tensor(run(model, example_inputs, who))
            if want is not None and got is not None and bool(want.isfinite().all()):
                error, most = relative_error(got, want), max(TOLERANCE, 4 * torch.finfo(want.dtype).eps)
                if error > most:
                    raise ValueError(
                        f"{who}: rotate must leave outputs within {most:.0e}, got a change of {error:.1e}: something "
                        f"else than the norms and linears that were found reads or writes the residual stream of "
                        f"{residual.width} channels; {OUT}"
                    )
    return _told(residual)


def _told(residual: Residual) -> list[tuple[str, ...]]:
    name, side = residual.entry
    online = f"rotated {'before' if side == 'input' else 'behind'} {name} as it runs"
    where = f"rotated in {residual.stem}" if residual.stem else online
    back = "" if residual.last is None else f", back before {residual.last.name}"
    readers = sum(len(norm.readers) for norm in residual.norms)
    return [
        (f"{residual.width} channels in blocks of {residual.rotation.block} {where}{back}",),
        (f"{len(residual.norms)} norms with {readers} readers", f"{len(residual.writers)} writers"),
    ]


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[list[Any]]:
    """Yields a list for handles of hooks; an error removes them and gives parameters their values back."""
    before = [(p, _copy(p, f"{number}.before")) for number, p in enumerate(model.parameters())]
    handles: list[Any] = []
    try:
        yield handles
    except BaseException:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


def _copy(parameter: Tensor, name: str) -> Tensor:
    """Copies values: to a file beside that which the parameter is mapped from, if it is, else in memory."""
    file = parameter.untyped_storage().filename
    return parameter.detach().clone() if file is None else in_file(parameter, Path(file).parent / name)


def _rotate_residual(model: nn.Module, residual: Residual, handles: list[Any]) -> None:
    rotation = residual.rotation
    outputs = list(residual.writers)
    if not residual.stem:
        name, side = residual.entry
        handles.append(install_rotation(model.get_submodule(name), side, rotation))
    elif is_linear(model.get_submodule(residual.stem)):
        outputs.append(residual.stem)
    else:
        _rotate_columns(model.get_submodule(residual.stem), rotation)
    for norm in residual.norms:
        _fold_norm(model, norm, rotation)
    for name in outputs:
        layer: Any = model.get_submodule(name)
        rows = matrix_of(layer, layer.weight.detach())
        rows.copy_(rotation(rows.float().t()).t())
        if layer.bias is not None:
            layer.bias.copy_(rotation(layer.bias.float()))
    if residual.last is not None:
        handles.append(install_rotation(model.get_submodule(residual.last.name), "input", rotation.back))


def _rotate_columns(layer: Any, rotation: Rotation) -> None:
    """Rotates the columns of a layer's weight: of what its rows are, or what it reads."""
    rows = matrix_of(layer, layer.weight.detach())
    rows.copy_(rotation(rows.float()))


def _fold_norm(model: nn.Module, norm: ResidualNorm, rotation: Rotation) -> None:
    """Moves the gain of a norm into the linears behind it, and its shift into their biases, and turns their columns.

    A shift stays, turned, where a linear has no bias: then it is divided by the gain.
    """
    module: Any = model.get_submodule(norm.name)
    gain = module._parameters["weight"].detach().double() + norm.offset
    shift = module._parameters.get("bias")
    shift = None if shift is None else shift.detach().double()
    readers: list[Any] = [model.get_submodule(name) for name in norm.readers]
    into_biases = all(layer.bias is not None for layer in readers)
    without_gain(module, norm.offset)
    for layer in readers:
        rows = matrix_of(layer, layer.weight.detach())
        if shift is not None and into_biases:
            layer.bias.copy_(layer.bias.double() + rows.double() @ shift)
        rows.copy_(rotation((rows.double() * gain).float()))
    if shift is not None and not into_biases:
        divided = torch.where(shift == 0, 0.0, shift / torch.where(gain == 0, 1.0, gain))
        module._parameters["bias"].copy_(rotation(divided.float()))


def _rotate_input(model: nn.Module, writer: str, values: ValueRows | None, handles: list[Any]) -> None:
    """Rotates what a writer reads: in the rows that make it, or as it runs."""
    layer: Any = model.get_submodule(writer)
    if values is not None:
        _rotate_values(model, layer, values)
        return
    block = hadamard_block(matrix_of(layer, layer.weight).shape[1])
    if block >= LEAST:
        _rotate_columns(layer, Rotation(block))
        handles.append(install_rotation(layer, "input", Rotation(block)))


def _rotate_values(model: nn.Module, writer: nn.Module, values: ValueRows) -> None:
    linear: Any = model.get_submodule(values.linear)
    rows = matrix_of(linear, linear.weight.detach())[values.start :]
    rows.copy_(hadamard(rows.float().t(), block=values.block).t())
    if linear.bias is not None:
        bias = linear.bias.detach()[values.start :]
        bias.copy_(hadamard(bias.float(), block=values.block))
    _rotate_columns(writer, Rotation(values.block))


def _pairs(model: nn.Module, example_inputs: Inputs, residual: Residual, who: str) -> dict[str, ValueRows]:
    """Returns for each writer that reads values, head by head, the rows that make them.

    What holds in one layer is tried there, and taken for all of its kind: names that differ in numbers only.
    """
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    readers = sorted((name for norm in residual.norms for name in norm.readers), key=lambda name: -place[name])
    known: dict[Any, ValueRows | None] = {}
    found = {}
    for writer in residual.writers:
        depth = max((_shared_depth(writer, name) for name in readers), default=0)
        near = [name for name in readers if _shared_depth(writer, name) == depth]
        shapes = [tuple(model.get_parameter(f"{name}.weight").shape) for name in (writer, *near)]
        kind = (*(re.sub(r"\d+", "", name) for name in (writer, *near)), *shapes)
        if kind not in known:
            known[kind] = _values_of(model, example_inputs, writer, near, depth, who)
        one = known[kind]
        if one is not None:
            same = next(name for name in near if re.sub(r"\d+", "", name) == re.sub(r"\d+", "", one.linear))
            found[writer] = ValueRows(same, one.start, one.block)
    return found


def _shared_depth(a: str, b: str) -> int:
    """Counts the modules that hold both."""
    parts = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))


def _values_of(
    model: nn.Module, example_inputs: Inputs, writer: str, near: list[str], depth: int, who: str
) -> ValueRows | None:
    """Returns the rows whose rotation, in blocks as large as may be, the writer can take back: tried on its module."""
    run_module = _replay(model, example_inputs, ".".join(writer.split(".")[:depth]), who)
    layer: Any = model.get_submodule(writer)
    columns = matrix_of(layer, layer.weight).shape[1]
    want = run_module()

    def holds(values: ValueRows) -> bool:
        with restored([layer, model.get_submodule(values.linear)]):
            _rotate_values(model, layer, values)
            got = run_module()
        if want is None or got is None:
            return False
        return relative_error(got, want) <= max(TOLERANCE, 4 * torch.finfo(want.dtype).eps)

    for name in near:
        linear: Any = model.get_submodule(name)
        count = len(matrix_of(linear, linear.weight))
        for start in (0, count // 3 * 2) if count % 3 == 0 else (0,):  # the last third: of queries, keys and values
            blocks = [b for b in range(columns, 1, -1) if columns % b == 0 and (count - start) % b == 0]
            blocks = [b for b in blocks if hadamard_block(b) == b]
            if not blocks or not holds(ValueRows(name, start, blocks[-1])):
                continue
            block = next(b for b in blocks if holds(ValueRows(name, start, b)))
            if block >= LEAST:
                return ValueRows(name, start, block)
    return None


def _replay(model: nn.Module, example_inputs: Inputs, name: str, who: str) -> Callable[[], Tensor | None]:
    """Returns what runs a module as the network runs it on the inputs; the network itself for ""."""
    if not name:
        return lambda: first_tensor(run(model, example_inputs, who))
    module = model.get_submodule(name)
    seen: list[tuple[Any, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        stop()

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with stopped():
            run(model, example_inputs, who)
    finally:
        handle.remove()
    if not seen:
        return lambda: None
    args, kwargs = seen[0]
    return lambda: first_tensor(module(*args, **kwargs))
