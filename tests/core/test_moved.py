"""Modules under their old names."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: no kernel is tested here")


@pytest.mark.parametrize(
    ("old", "new", "name", "needs"),
    [
        ("export.checkpoint", "llm.quantize_checkpoint", "quantize_checkpoint", "transformers"),
        ("export.language", "llm.load", "load_language_model", "transformers"),
        ("export.interchange", "llm.interchange", "export_language_model", "transformers"),
        ("export.transformers_quantizer", "llm.transformers_quantizer", "describe", "transformers"),
        ("export.onnx_graph", "export.onnx", "export_onnx", "onnx"),
        ("export.package", "export.torch_package", "export_package", "torch"),
    ],
)
def test_what_is_imported_by_an_old_name_is_that_of_the_new_one(old: str, new: str, name: str, needs: str):
    pytest.importorskip(needs, reason=f"the module needs {needs}")
    with pytest.warns(DeprecationWarning, match=f"gs_algos.{old} is now gs_algos.{new}"):
        found = getattr(importlib.import_module(f"gs_algos.{old}"), name)
    assert found is getattr(importlib.import_module(f"gs_algos.{new}"), name)


def test_what_an_old_name_never_had_is_an_attribute_error():
    with (
        pytest.warns(DeprecationWarning, match="is now gs_algos.export.torch_package"),
        pytest.raises(AttributeError, match=r"torch_package.* has no attribute 'nothing'"),
    ):
        getattr(importlib.import_module("gs_algos.export.package"), "nothing")  # noqa: B009
