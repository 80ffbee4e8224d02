"""Modules under their old names."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.helpers import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: no kernel is tested here")


@pytest.mark.parametrize(
    ("old", "new", "needs"),
    [
        ("export.checkpoint", "llm.quantize_checkpoint", "transformers"),
        ("export.language", "llm.load", "transformers"),
        ("export.interchange", "llm.interchange", "transformers"),
        ("export.transformers_quantizer", "llm.transformers_quantizer", "transformers"),
        ("export.onnx_graph", "export.onnx", "onnx"),
        ("export.package", "export.torch_package", "torch"),
    ],
)
def test_an_old_name_is_the_new_module_and_says_so(old: str, new: str, needs: str):
    pytest.importorskip(needs, reason=f"the module needs {needs}")
    sys.modules.pop(f"gs_algos.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"gs_algos.{new}"):
        assert importlib.import_module(f"gs_algos.{old}") is importlib.import_module(f"gs_algos.{new}")
