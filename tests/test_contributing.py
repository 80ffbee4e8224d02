"""The op and the pattern that CONTRIBUTING.md adds work as the page says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from gs_algos.fx import patterns
from gs_algos.fx.capture.capture import capture
from gs_kernels.runtime.opspec import OpSpec
from tests.helpers import INTERPRET, fenced, same_bits
from tests.test_docs import FILE, ROOT, blocks

DTYPES = (torch.float32, torch.float16)  # of bf16 the interpreter makes something else


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files that the page shows, in the folders where it puts them."""
    for block in blocks(ROOT / "CONTRIBUTING.md", "python"):
        path = tmp_path / FILE.match(block)[1]  # type: ignore[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
        for folder in (path.parent, path.parent.parent):
            name = ".".join(folder.relative_to(tmp_path).parts)
            package = importlib.import_module(name) if name and (ROOT / name.replace(".", "/")).is_dir() else None
            if package is not None and str(folder) not in package.__path__:
                monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "clip" in name or name.endswith(".gate"):
            del sys.modules[name]


def test_the_op_agrees_with_its_reference(added: None):
    spec: OpSpec = importlib.import_module("gs_kernels.clip.spec").SPECS[0]
    for shape in spec.test_shapes:
        for dtype in DTYPES:
            case = spec.make(shape, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
            (x,) = case.args
            assert same_bits(spec.run(fenced(x), **case.kwargs), spec.ref(x, **case.kwargs))
    with pytest.raises(ValueError, match="clip: limit must be >= 0, got -1"):
        spec.run(torch.ones(2), limit=-1.0)


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: nothing here has a kernel")
def test_the_pattern_is_found(added: None, monkeypatch: pytest.MonkeyPatch):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sigmoid()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value(x) * self.act(self.gate(x))

    monkeypatch.setattr(patterns, "ORDER", (*patterns.ORDER, "gate"))
    net = Gated()
    found, _ = patterns.match(capture(net, torch.randn(2, 4)), net)
    assert [match.roles for match in found if match.pattern == "gate"] == [{"gate": "act"}]
