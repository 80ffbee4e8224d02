"""Where pixels are is computed in 64 bits: one image may hold 2**31 elements, which no test here can allocate."""

import re

import pytest
import torch

from gs_kernels.qconv2d.geometry import make_geometry
from gs_kernels.qconv2d.op import conv_refuses
from gs_kernels.qmatmul.tune import make_weight
from gs_kernels.runtime.dispatch import INTERPRET, meta_tensors_run_kernels
from gs_kernels.runtime.opspec import specs

IMAGE_STRIDE = re.compile(r"stride_[xr][bchw]")
FROM_ONE = re.compile(r"tt\.(splat|expand_dims|broadcast)|arith\.(muli|divsi|trunci)")


def _products_of_strides(text: str) -> list[str]:
    """The 32-bit products in front of the loop of a number that depends on a program with a stride of an image."""
    constants, strides, found = set(), set(), []
    for line in text[: text.index("scf.for")].splitlines():
        made = re.match(r"\s*(%[\w#]+) = ([\w.]+) ?(.*?)(?: loc\(|$)", line)
        if made is None:
            strides |= set(re.findall(r"(%stride_[xr][bchw]): i32", line))
            continue
        name, op, rest = made.groups()
        values = set(re.findall(r"%[\w#]+", rest))
        if op == "arith.constant":
            constants.add(name)
        elif values & strides and FROM_ONE.match(op):
            if op == "arith.muli" and not values & constants and rest.endswith("i32>") | rest.endswith(": i32"):
                found.append(line.strip())
            strides.add(name)
    return found


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels cannot be compiled in this process")
@pytest.mark.parametrize("op", ["qconv2d", "qconv2d_int8"])
def test_no_product_of_an_images_stride_has_32_bits(op):
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
    from gs_kernels.aot.sweep import spec_kernels

    seen = set()
    for kernel in spec_kernels([spec for spec in specs() if spec.name == op], "sm_90"):
        if kernel.name in ("_qconv2d_kernel", "_qconv2d_int8_kernel", "_depthwise_kernel"):
            text = str(kernel.lower("ttir")[0])
            if "scf.for" in text:
                seen.add(kernel.name)
                assert _products_of_strides(text) == [], kernel.signature
    assert len(seen) == 2


def test_a_filter_that_reaches_over_2_to_the_31_elements_is_refused():
    weight = make_weight(4, 8, 9 * 64, 9 * 64, torch.float32, "meta")
    geometry = make_geometry("test", 3, 1, 1, 1, 1)
    size = (1, 64, 4, 4)
    near, far = (torch.empty_strided(size, (0, s, 4, 1), device="meta") for s in (1 << 20, 1 << 26))
    with meta_tensors_run_kernels():
        assert conv_refuses(near, weight, None, None, geometry) == []
        (reason,) = conv_refuses(far, weight, None, None, geometry)
    assert "less than 2**31 elements apart, got strides (0, 67108864, 4, 1)" in reason
