"""Packed layers on bound calls: how deep they are, whose weight they read, what copies and files of them hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gs_algos.quant.packed.conv import PackedConv
from gs_algos.quant.packed.linear import PackedLinear
from gs_kernels.runtime import bound_calls
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import frames
from tests.kernels.runtime.pretended_gpus import kept, pointers, rows, weight

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")
if INTERPRET:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


def layer(gpu):
    made = PackedLinear.from_packed(weight(), torch.zeros(64), torch.bfloat16).eval()
    kept(gpu, made.codes, made.scale, made.bias)
    return made


@torch.no_grad()
def test_a_bound_packed_linear_is_at_most_6_frames_deep_and_16_calls(gpu):
    made, x = layer(gpu), rows(1, 256)
    deepest, calls = frames(lambda: made(x))
    assert deepest <= 6 and calls <= 16, (deepest, calls)


def conv(gpu):
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    geometry |= {"padding_mode": "zeros", "pad": [1, 1, 1, 1]}
    made = PackedConv(weight(64, 64 * 9, 64 * 9), geometry, (64, 3, 3), torch.zeros(64), torch.bfloat16).eval()
    kept(gpu, made.codes, made.scale, made.bias)
    return made


@torch.no_grad()
def test_a_bound_packed_convolution_launches_what_the_long_way_does_in_at_most_24_calls(gpu):
    made, x = conv(gpu), torch.ones(1, 64, 7, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    kept(gpu, x)
    want = gpu.run(lambda: made(x), long_way=True)
    assert gpu.run(lambda: made(x)) == want
    assert gpu.run(lambda: made(x)) == want
    deepest, calls = frames(lambda: made(x))
    assert deepest <= 7 and calls <= 24, (deepest, calls)


@torch.no_grad()
def test_a_packed_convolution_refuses_a_residual_that_does_not_fit(gpu):
    made, x = conv(gpu), torch.ones(1, 64, 7, 7, dtype=torch.bfloat16)
    for _ in range(2):
        made.run(x, x, "none")
    with pytest.raises(ValueError, match="residual must have shape"):
        made.run(x, x[:, :, :, :5], "none")


def test_layers_of_one_form_share_a_bound_call(gpu):
    a, b, x = layer(gpu), layer(gpu), rows(1, 256)
    a(x), b(x)
    assert len(bound_calls._calls) == 1
    assert a.codes.data_ptr() in pointers(gpu.run(lambda: a(x)))
    assert b.codes.data_ptr() in pointers(gpu.run(lambda: b(x)))


def test_copies_and_files_of_a_layer_hold_no_bound_call(gpu):
    made, x = layer(gpu), rows(1, 256)
    before = pickle.dumps(layer(gpu))
    made(x), made(x)
    assert len(pickle.dumps(made)) == len(before)
    copied = copy.deepcopy(made)
    kept(gpu, copied.codes)
    assert copied.codes.data_ptr() in pointers(gpu.run(lambda: copied(x)))


def test_a_layer_reads_what_was_loaded_into_it_or_put_in_its_place(gpu):
    made, x = layer(gpu), rows(1, 256)
    made(x)
    made.load_state_dict({k: v.clone() for k, v in made.state_dict().items()})
    kept(gpu, made.codes)
    assert made.codes.data_ptr() in pointers(gpu.run(lambda: made(x)))
    made.codes.data = kept(gpu, made.codes.data.clone())
    assert made.codes.data_ptr() in pointers(gpu.run(lambda: made(x)))
    made.codes = kept(gpu, made.codes.clone())
    assert made.codes.data_ptr() in pointers(gpu.run(lambda: made(x)))
