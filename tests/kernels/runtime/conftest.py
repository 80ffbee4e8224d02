"""Fixtures of tests of what goes on between a call and its launches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.runtime.pretended_gpus import Gpu, pretended


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with pretended(monkeypatch) as gpu:
        yield gpu
