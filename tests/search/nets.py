"""Searches of a small network that take a moment, and their data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gs_algos import SimQAT
from gs_algos.search.policy import Policy
from gs_algos.search.search import search_rules
from tests.search.nets_alone import images, net

__all__ = ["data", "found", "images", "net"]


def data() -> list[Tensor]:
    return [images(16, 2), images(16, 3)]


def found(algorithms: Any = None, model: nn.Module | None = None, **options: Any) -> Policy:
    algorithms = SimQAT(act=None) if algorithms is None else algorithms
    return search_rules(net() if model is None else model, images(), algorithms, data(), **options)
