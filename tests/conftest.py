"""Fixtures that several test folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import DEVICE, poisoned_outputs


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one and kernels compile, else the CPU."""
    return DEVICE


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is NaN."""
    with poisoned_outputs():
        yield
