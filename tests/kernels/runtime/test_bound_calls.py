"""Adds: launches of a bound call are those of the long way, whatever happened in between; without a GPU."""

from __future__ import annotations

import copy
import logging
import random
import threading

import pytest
import torch

from gs_kernels import (
    PerChannel,
    PerGroup,
    code_sums,
    fake_quant,
    hadamard,
    hadamard_quantize_rows,
    qconv2d,
    qconv2d_int8,
    qmatmul,
    qmatmul_int8,
    quantize_rows,
    slb_weight,
)
from gs_kernels.runtime import bound_calls, triton_private
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import OpSpec, specs
from gs_kernels.tuning import tables
from tests.helpers import gradients, tensors
from tests.kernels.runtime.pretended_gpus import kept, pointers, rows, weight
from tests.kernels.traces import traced_launches

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")
if INTERPRET:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
from gs_kernels.qconv2d.kernel import int8


def _qmatmul(r):
    dtype = r.choice((torch.bfloat16, torch.float16, torch.float32))
    w = weight(r.choice((64, 17)), 256, r.choice((32, 128, 256)), bits=r.choice((2, 4)), points=r.random() < 0.5)
    m = r.choice((1, 2, 16, 1 if dtype == torch.float32 else 17))  # more rows in fp32 are for cuBLAS
    x = rows(m, 256, offset=r.choice((0, 1, 8)), step=r.choice((0, 1, 16)), dtype=dtype)
    bias = r.choice((None, torch.ones(w.shape[0] + 1)[r.choice((0, 1)) :][: w.shape[0]]))
    activation = r.choice(("none", "relu"))
    return (x, w.codes, w.scale, bias), lambda: qmatmul(x, w, bias, activation=activation)


def _int8(r):
    w, m = weight(64, r.choice((128, 1024)), 128), r.choice((1, 3))
    x = rows(m, w.shape[1], offset=r.choice((0, 1, 16)), dtype=torch.int8)
    scale = torch.ones(r.choice((1, m)))
    return (x, w.codes, w.scale, scale), lambda: qmatmul_int8(x, scale, w, dtype=torch.float16)


def _quantize(r):
    x = rows(r.choice((1, 5)), r.choice((16, 33)), offset=r.choice((0, 1, 8)), step=r.choice((0, 3)))
    return (x,), lambda: quantize_rows(x)


def _conv(r):
    w, b = weight(64, 64 * 9, 64 * 9), r.choice((1, 2))
    x = torch.ones(b, 64, 7, 7, dtype=torch.bfloat16)
    x = x.to(memory_format=r.choice((torch.channels_last, torch.contiguous_format)))
    residual = r.choice((None, torch.ones(b, 64, 7, 7)))
    padding = r.choice((1, (1, 1), "same"))
    return (x, w.codes, w.scale, residual), lambda: qconv2d(x, w, kernel_size=3, padding=padding, residual=residual)


def _fake_quant(r):
    x = rows(16, 64, offset=r.choice((0, 1)), step=r.choice((0, 2)), dtype=r.choice((torch.float32, torch.float16)))
    granularity = r.choice((PerChannel(0), PerChannel(1), PerGroup(32)))
    n = {PerChannel(0): 16, PerChannel(1): 64, PerGroup(32): 32}[granularity]
    scale, zero, qmin = torch.ones(n), torch.zeros(n), r.choice((-8, 0))
    return (x, scale, zero), lambda: fake_quant(x, scale, zero, qmin=qmin, qmax=7, granularity=granularity)


def _hadamard(r):
    x = rows(r.choice((1, 5)), r.choice((64, 448)), offset=r.choice((0, 1)), step=r.choice((0, 3)))
    signs = r.choice((None, torch.ones(x.shape[1], dtype=torch.int8)))
    run, block = r.choice((hadamard, hadamard_quantize_rows)), r.choice((x.shape[1], 32))
    return (x, signs), lambda: run(x, signs, block=block)


@pytest.mark.parametrize("make", [_qmatmul, _int8, _quantize, _conv, _fake_quant, _hadamard])
def test_a_bound_call_launches_what_the_long_way_does(gpu, make):
    r = random.Random(0)
    for _ in range(60):
        operands, call = make(r)
        gpu.kept = {t.untyped_storage().data_ptr() for t in operands if t is not None}
        recorded, bound, want = gpu.run(call), gpu.run(call), gpu.run(call, long_way=True)
        assert bound == recorded == want
    assert all(bound_calls._calls.values())  # every form was


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_every_op_launches_and_repeats_it_forward_and_backward(gpu, spec: OpSpec):
    case = spec.make(spec.test_shapes[-1], next(iter(spec.tol)), torch.device("cpu"), torch.Generator().manual_seed(0))
    leaves = [case.args[i].requires_grad_() for i in case.grad_args]

    def call():
        ys = tensors(spec.run(*case.args, **case.kwargs))
        if leaves:
            gradients(ys, leaves, [torch.ones_like(y) for y in ys])

    first, again = gpu.run(call), gpu.run(call)
    assert first and [launch[:5] for launch in again] == [launch[:5] for launch in first]


def test_a_list_among_the_arguments_tells_forms_apart(gpu):
    logits, levels, temperature = torch.zeros(8, 2, 36), torch.zeros(2), torch.ones(1)
    for shape in ((8, 36), [8, 4, 9], (8, 36), [8, 4, 9]):
        assert slb_weight(logits, levels, temperature, shape=shape).shape == tuple(shape)
    assert len(bound_calls._calls) == 2


def test_each_call_has_results_of_its_own(gpu):
    x, w = rows(1, 256), weight()
    a, b = qmatmul(x, w), qmatmul(x, w)
    assert a.data_ptr() != b.data_ptr()
    assert (b.shape, b.dtype, b.is_contiguous()) == ((1, 64), torch.bfloat16, True)


def test_a_result_has_the_axes_of_the_long_way(gpu):
    x, w = torch.ones(2, 3, 256), weight()
    qmatmul(x, w)
    assert qmatmul(x, w).shape == (2, 3, 64)
    image = torch.ones(2, 64, 7, 7)
    first, second = (qconv2d(image, weight(64, 64, 64), kernel_size=1) for _ in range(2))
    assert second.shape == first.shape and second.stride() == first.stride()


def test_two_results_come_as_two(gpu):
    first, second = quantize_rows(rows(3, 64)), quantize_rows(rows(3, 64))
    assert [(t.shape, t.dtype) for t in second] == [(t.shape, t.dtype) for t in first]


def test_a_bound_call_launches_into_the_stream_of_now(gpu):
    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    gpu.stream = 7
    assert {launch[4] for launch in gpu.run(lambda: qmatmul(x, w))} == {7}


def test_a_call_on_another_gpu_is_bound_apart_and_launched_there(gpu):
    x, w = rows(1, 256), weight()
    for first, index in ((None, 0), (set(), 1), (None, 0), (set(), 1)):
        gpu.first = first
        assert {launch[2] for launch in gpu.run(lambda: qmatmul(x, w))} == {index}
        assert gpu.present == 0
    assert [call.index for call in bound_calls._calls.values()] == [0, 1]


def test_hooks_that_are_set_later_are_called(gpu):
    from triton import knobs

    x, w, seen = rows(1, 256), weight(), []
    qmatmul(x, w)
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launches = gpu.run(lambda: qmatmul(x, w))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert [metadata.get()["name"] for metadata in seen] == [launch[0] for launch in launches]


def test_a_setting_that_changes_what_is_compiled_is_seen(gpu, monkeypatch):
    from triton import knobs

    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert gpu.run(lambda: qmatmul(x, w)) == gpu.run(lambda: qmatmul(x, w), long_way=True)


def test_an_implementation_that_is_forced_later_runs(gpu, monkeypatch):
    x, w = torch.ones(1, 256), weight(dtype=torch.float32)
    qmatmul(x, w)
    monkeypatch.setenv("GS_BACKEND", "ref")
    assert gpu.run(lambda: qmatmul(x, w)) == []


def test_a_tile_that_is_forced_later_is_taken(gpu):
    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    tile = {"dense": False, "scale_parts": False, "block_m": 16, "block_n": 32, "warps": 4, "stages": 2, "programs": 0}
    with tables.forced("qmatmul", tile):
        inside = gpu.run(lambda: qmatmul(x, w))
    assert inside[0][3][0] == 2  # 64 columns in tiles of 32
    assert gpu.run(lambda: qmatmul(x, w))[0][3][0] == 1


def test_arguments_that_are_wrong_are_refused_after_right_ones(gpu):
    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    with pytest.raises(ValueError, match="last axis of x must be K=256"):
        qmatmul(x[:, :128], w)
    with pytest.raises(TypeError, match="weight must be a PackedWeight"):
        qmatmul(x, [w])
    with pytest.raises(ValueError, match="activation must be one of"):
        qmatmul(x, w, activation="tanh")
    with pytest.raises(TypeError, match="bias must be a tensor"):
        qmatmul(x, w, bias=[0.0] * 64)


def test_a_weight_that_no_longer_fits_is_refused(gpu):
    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    w.scale.data = w.scale.data[:, :1]
    with pytest.raises(ValueError, match=r"weight.scale must have shape \[64, 2\]"):
        qmatmul(x, w)


def test_gradients_come_after_a_bound_call_without(gpu):
    x, w = torch.ones(2, 256), weight(dtype=torch.float32)
    for _ in range(2):
        assert qmatmul(x, w).grad_fn is None
    x.requires_grad_()
    for _ in range(2):
        assert qmatmul(x, w).grad_fn is not None
    with torch.no_grad():
        assert not qmatmul(x, w).requires_grad


def test_forward_mode_derivatives_are_refused_after_a_bound_call(gpu):
    x, w = torch.ones(2, 256), weight(dtype=torch.float32)
    qmatmul(x, w)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            qmatmul(dual, w)


def test_a_tracer_sees_the_launches_of_a_bound_call(gpu):
    x, w = rows(1, 256), weight()
    qmatmul(x, w)
    launches, _ = traced_launches(lambda x, codes, scale: qmatmul(x, copy.copy(w)), x, w.codes, w.scale)
    assert launches == [["y_ptr"]] and not gpu.run(lambda: None)


def test_a_call_that_computes_something_by_itself_is_not_bound(gpu):
    w, x = weight(points=True), rows(1, 256)
    w.zero.data = w.zero.data.t().contiguous().t()  # kernels read zero points as the scales lie: copied in each call
    for _ in range(2):
        got = gpu.run(lambda: qmatmul(x, w))
        assert got == gpu.run(lambda: qmatmul(x, w), long_way=True)
    assert list(bound_calls._calls.values()) == [None]


def test_an_argument_that_is_given_twice_does_not_stand_for_two(gpu):
    x, w = torch.ones(1, 64, 4, 4), weight(64, 64, 64, dtype=torch.float32)
    other = torch.ones(1, 64, 4, 4)
    kept(gpu, x, other)
    qconv2d(x, w, kernel_size=1, residual=x)
    got = gpu.run(lambda: qconv2d(x, w, kernel_size=1, residual=other))
    assert other.data_ptr() in pointers(got)


def _with_zero_point():
    w, x, scale = weight(64, 64 * 9, 64 * 9), torch.ones(1, 64, 7, 7, dtype=torch.int8), torch.ones(1)
    sums = code_sums(w)
    return lambda zero: qconv2d_int8(x, scale, w, kernel_size=3, padding=1, x_zero=zero, code_sums=sums)


def padding_of(launches):
    return launches[0][5][4][1]  # the address of a pixel outside the image


def test_the_padding_of_a_zero_point_is_made_once_and_again_when_that_changes(gpu):
    run, zero, other = _with_zero_point(), torch.full((1,), 3.0), torch.full((1,), 5.0)
    made = {}

    def pixel(t):
        codes = torch.full((128,), int(t), dtype=torch.int8)
        gpu.kept.add(codes.untyped_storage().data_ptr())
        made[codes.data_ptr()] = codes
        return codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_pixel_of_zeros", pixel)
        read = lambda t: int(made[padding_of(gpu.run(lambda: run(t)))][0])  # noqa: E731
        assert [read(zero), read(zero), read(other), read(other), read(zero)] == [3, 3, 5, 5, 3]
        assert len(made) == 2 and len(bound_calls._calls) == 1 and all(bound_calls._calls.values())
        zero.fill_(7)
        assert [read(zero), read(zero)] == [7, 7]
        assert len(made) == 3
        gpu.stream = 1  # where what another stream makes may not be ready
        assert read(zero) == 7 and len(made) == 4
        gpu.stream, gpu.capturing = 2, True
        assert read(zero) == 7 and len(made) == 4
        zero.fill_(9)
        assert [read(zero), read(zero)] == [9, 9] and len(made) == 6  # a capture keeps nothing
    count = len(bound_calls._kept)
    del zero
    assert len(bound_calls._kept) == count - 1


def test_a_call_is_recorded_in_its_own_thread(gpu):
    x, w = rows(1, 256), weight()
    recording = bound_calls._thread.recording = bound_calls.Recording()
    try:
        thread = threading.Thread(target=lambda: qmatmul(x, w))
        thread.start()
        thread.join()
    finally:
        bound_calls._thread.recording = None
    assert recording.launches == [] and all(bound_calls._calls.values())


def test_forms_are_forgotten_when_there_are_too_many(gpu, monkeypatch):
    monkeypatch.setattr(bound_calls, "MAX_CALLS", 3)
    w = weight()
    for m in range(1, 9):
        qmatmul(rows(m, 256), w)
    assert len(bound_calls._calls) <= 3


def test_an_unknown_triton_launches_through_its_jit_and_says_so_once(gpu, monkeypatch, caplog):
    import triton

    monkeypatch.setattr(triton, "__version__", "9.0.0")
    triton_private.launches_directly.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "gs_kernels"):
            launches = [gpu.run(lambda: qmatmul(rows(1, 256), weight())) for _ in range(3)]
    finally:
        monkeypatch.undo()
        triton_private.launches_directly.cache_clear()
    assert all(launches) and not bound_calls._calls
    assert [r.message for r in caplog.records if "9.0.0" in r.message] == [
        "every launch goes through Triton's JIT, some 20 us of CPU time more: Triton 9.0.0 is not one of 3.6 to 3.9"
    ]
