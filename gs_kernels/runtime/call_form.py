"""Writes, for an op, the function that gives what its bound calls are found by: the form of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from gs_kernels.runtime import device
from gs_kernels.runtime.dispatch import backend_setting
from gs_kernels.runtime.torch_private import PLAIN
from gs_kernels.runtime.triton_private import SETTINGS, settings

# of a tensor: what kernels are specialized by and launches are computed by
_TENSOR = """\
    if type({0}) in PLAIN:
        tensors.append({0})
        {0} = {0}.dtype, {0}.shape, {0}.stride(), index_of({0}), {0}.data_ptr() & 15 == 0"""


def make_form(
    op: str, types: Sequence[str], kinds: Sequence[Any]
) -> Callable[..., tuple[tuple[Any, ...], list[Tensor]]]:
    """Makes `form(*arguments)`, which returns a key, equal for calls that launch the same, and the tensors among them.

    The function is written out argument by argument, as a dataclass's are: a loop over them takes twice as long, and
    this is a third of a call.

    Args:
        types: of the arguments, as the schema names them.
        kinds: how each is carried (`gs_kernels.runtime.torch_op.Carried`); None for those that a schema knows.
    """
    names = [f"a{i}" for i in range(len(types))]
    body, key = [], []
    for name, type_, kind in zip(names, types, kinds, strict=True):
        if kind is None:
            parts = {name: type_.startswith("Tensor")}
        else:
            parts = {f"{name}_{f.name}": f.name in kind.tensors for f in fields(kind.cls)}
            body += [f"    {name}_{f.name} = {name}.{f.name}" for f in fields(kind.cls)]
            key.append(f"type({name})")
        for part, may_be_tensor in parts.items():
            body += [_TENSOR.format(part)] if may_be_tensor else []
            if kind is None and type_.endswith("[]"):
                key.append(f"tuple({part})")
            else:
                key += [part] if may_be_tensor or kind is not None else [part, f"type({part})"]
    lines = [
        f"def form({', '.join(names)}):",
        "    tensors, index_of, (runtime, compilation) = [], device.index_of, settings()",
        *body,
        f"    return ({op!r}, backend_setting(), {', '.join((*SETTINGS, *key))}), tensors",
    ]
    space: dict[str, Any] = {"PLAIN": PLAIN, "device": device, "backend_setting": backend_setting}
    space["settings"] = settings
    exec("\n".join(lines), space)  # of names that schemas and dataclasses have
    return space["form"]  # type: ignore[no-any-return]
