"""Defines what a step is made of: items, which are measured on a GPU, made up in a dry run, compiled ahead of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Holds what items of all kinds are told.

    device: "cuda" or "cpu", "meta" where launches are collected. seconds: for one number. tables: folder of the
    tuner's. ceilings: what was measured first, by name (`copy_gbps`, `bfloat16_tflops`, ...). shortlist: file of ranked
    tiles.
    """

    device: str
    seconds: float
    tables: Path
    ceilings: dict[str, float] = field(default_factory=dict)
    shortlist: Path | None = None

    @property
    def peaks(self) -> dict[str, float]:
        end = "_tflops"
        return {name.removesuffix(end): value for name, value in self.ceilings.items() if name.endswith(end)}


class Failed(Exception):
    """Says why an item failed whose rows are written."""


@dataclass(frozen=True)
class Item(ABC):
    """Does one thing of a plan.

    id: as rows name it, unique in a plan. op, bits: of what it runs, which a failed contact check rules out; "" and 0
    for nothing that can be ruled out.
    """

    id: str
    op: str = ""
    bits: int = 0

    @abstractmethod
    def run(self, context: Context) -> Iterator[Row]:
        """Yields rows as they are measured; raises if there is none, or one says that our own code is wrong."""

    @abstractmethod
    def make_up(self, context: Context) -> Iterator[Row]:
        """Yields rows such as `run` does, without a GPU."""

    def launch(self, context: Context) -> None:  # noqa: B027  what runs no kernel of ours has none to compile
        """Makes the calls of `run` with meta tensors: `--precompile` collects what they launch."""
