"""Fixtures of tests of kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels import ptx


@pytest.fixture
def emulated_assembly(monkeypatch):
    """The interpreter runs inline PTX as `ptx.run` does."""
    tl = pytest.importorskip("triton.language", reason="Triton is not installed: there are no kernels")
    from triton.runtime.interpreter import TensorHandle

    def elementwise(asm, constraints, args, dtype, is_pure, pack):
        containers = args[0].handle.data
        words = [np.ascontiguousarray(a.handle.data).view(np.uint32).reshape(-1, pack // 2) for a in args]
        outputs = ptx.run(asm, [w[:, i].copy() for w in words for i in range(pack // 2)], len(dtype))
        fields = [o.view(np.int16 if pack == 2 else np.int8).reshape(containers.shape) for o in outputs]
        return tuple(
            tl.core.tensor(TensorHandle(f, t.scalar), tl.block_type(t.scalar, list(f.shape)))
            for f, t in zip(fields, dtype, strict=True)
        )

    monkeypatch.setattr(tl, "inline_asm_elementwise", elementwise)
