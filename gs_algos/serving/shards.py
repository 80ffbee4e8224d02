"""Computes the format of the part of a packed weight that an engine holds: layers stacked into one, cut for processes.

An engine multiplies some layers at once (q, k and v; gate and up): their rows are stacked, which the packing allows at
any row. Tensor parallelism cuts rows (N) anywhere, and columns (K) between groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gs_algos.quant.packed.module import SCALES_8, PackedFormat

WHO = "golden-stick in vLLM"
PARALLEL = range(1, 65)  # the sizes of tensor parallelism among which an error looks for those that fit


def refuse_unserved(layers: Mapping[str, PackedFormat]) -> None:
    """Raises for 4-bit floats, whose 8-bit scales no parameter here carries.

    Raises:
        ValueError: so.
    """
    floats = [name for name, format in layers.items() if format.scale_dtype in SCALES_8]
    if floats:
        raise ValueError(
            f"{WHO}: layers must be packed in integers, got {floats[0]} and {len(floats) - 1} more in 4-bit floats; "
            "vLLM reads what golden-stick export --to compressed-tensors writes of them, or use golden-stick serve"
        )


def stacked(layers: Mapping[str, PackedFormat], names: Sequence[str]) -> PackedFormat | None:
    """Returns the format of the layers `names` stacked into one, or None if none of them is packed.

    Raises:
        ValueError: if they cannot be one weight: some are float, or their bits, groups, zero points or dtypes differ.
    """
    formats = [layers[name] for name in names if name in layers]
    if not formats:
        return None
    first = formats[0]
    rows = sum(format.shape[0] for format in formats)
    alike = [replace(format, shape=(first.shape[0], format.shape[1])) for format in formats]
    if len(formats) < len(names) or any(format != first for format in alike):
        got = ", ".join(f"{name}: {_described(layers.get(name))}" for name in names)
        raise ValueError(
            f"{WHO}: layers that are multiplied at once must be packed alike, got {got}; "
            "quantize them again under one rule, or serve the folder with Transformers"
        )
    return replace(first, shape=(rows, first.shape[1]))


def shard(format: PackedFormat, name: str, rows: int, columns: int) -> PackedFormat:
    """Returns the format of the part `[rows, columns]` that one process holds of a weight.

    A weight with one scale a row keeps it in every part.

    Raises:
        ValueError: if the cut goes through a group, or through a byte of codes.
    """
    k = format.shape[1]
    if columns == k:
        return replace(format, shape=(rows, k))
    per_row = format.group_size == k
    group = columns if per_row else format.group_size
    if columns % group or columns * format.bits % 8:
        unit = "a whole number of bytes of codes" if columns % group == 0 else f"a multiple of group_size {group}"
        fitting = [str(n) for n in PARALLEL if _fits(format, n)]
        raise ValueError(
            f"{WHO}: K / tensor_parallel_size of {name} must be {unit}, got {k} / {k // columns} = {columns}; "
            f"use a tensor_parallel_size of {', '.join(fitting)}, or quantize with smaller groups"
        )
    return replace(format, shape=(rows, columns), group_size=group)


def _fits(format: PackedFormat, parts: int) -> bool:
    k = format.shape[1]
    columns = k // parts
    group = 1 if format.group_size == k else format.group_size
    return k % parts == 0 and columns % group == 0 and columns * format.bits % 8 == 0


def _described(format: PackedFormat | None) -> str:
    if format is None:
        return "float"
    zero = "a zero point per group" if format.zero is None else f"zero point {format.zero:g}"
    table = ", a table of levels" if format.levels else ""
    return f"{format.bits} bits in groups of {format.group_size}, {zero}, {format.scale_dtype} scales{table}"
