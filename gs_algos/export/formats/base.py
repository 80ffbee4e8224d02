"""What a checkpoint format must say to be exported to and imported from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gs_algos.quant.packed import PackedFormat
from gs_kernels import PackedWeight


class Writer(Protocol):
    """Turns packed layers into the tensors of a format, and afterwards describes them all."""

    def layer(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors of one layer, by the names that they get behind the layer's."""

    def config(self, floats: list[str]) -> dict[str, Any]:
        """The `quantization_config`; floats: linear layers that were not given to `layer`."""


class Reader(Protocol):
    """Turns the tensors of a format into packed layers."""

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The weight of one layer from the tensors behind its name."""


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        method: its `quant_method` in config.json.
        marker: the tensor that every layer of it has; parts: all that a layer may have.
        heads: whether readers take a packed output head; else it is written as floats.
        writer: makes a writer for layers of these formats.
        reader: makes a reader from the `quantization_config`, or refuses it.
    """

    method: str
    marker: str
    parts: tuple[str, ...]
    heads: bool
    writer: Callable[[Collection[PackedFormat]], Writer]
    reader: Callable[[Mapping[str, Any], str], Reader]


def take(config: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """A value of the config.

    Raises:
        ValueError: if it is missing or of another kind.
    """
    value = config.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: {key} must be {names}, got {value!r:.80}; the config is damaged or too old")
    return value
