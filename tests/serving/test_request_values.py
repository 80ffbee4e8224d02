"""Numbers of a request reach the network as they were sent, or are refused in words without addresses of memory."""

from __future__ import annotations

import base64

import pytest
import torch

pytest.importorskip("litserve", reason="litserve is not installed; it is in the extra serve")

from fastapi import HTTPException

from gs_algos.export.torch_package import PackageInput
from gs_algos.serving.litserve_app import decode


@pytest.mark.parametrize(
    "dtype, values",
    [
        ("int64", [2**53 + 1, -(2**63), 2**63 - 1, 7.0]),
        ("int32", [2**31 - 1, -(2**31), 0, -0.0]),
        ("uint8", [0, 255, 1.0, 2]),
        ("bool", [0, 1, 1.0, 0]),
    ],
)
def test_whole_numbers_are_exact(dtype, values):
    x = decode({"input": values}, PackageInput((4,), dtype, "cpu"))
    assert x.tolist() == [int(v) for v in values] and x.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("value", [1.5, 2**63, -(2**63) - 1, 1e300, float("nan"), float("inf")])
def test_others_are_refused(value):
    with pytest.raises(HTTPException) as caught:
        decode({"input": [value, 1]}, PackageInput((2,), "int64", "cpu"))
    assert caught.value.detail == "serve: input must be of whole numbers that int64 holds, got others"


@pytest.mark.parametrize("data", [b"", b"GIF89a" + b"0" * 40, b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_picture_are_named_so(data):
    package_input = PackageInput((3, 2, 2), "float32", "cpu", ((0.5,) * 3, (0.2,) * 3))
    with pytest.raises(HTTPException) as caught:
        decode({"image": base64.b64encode(data).decode()}, package_input)
    assert caught.value.detail == "serve: image must be the base64 of a PNG or JPEG, got: other bytes"
