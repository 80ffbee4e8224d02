"""Convolutions of fp32 images that cuDNN does are not rounded to TF32, and the setting is as before afterwards."""

import threading

import pytest
import torch

from gs_kernels.qconv2d import dense
from gs_kernels.qconv2d.geometry import make_geometry
from gs_kernels.runtime.device import convolves_in_fp32

GEOMETRY = make_geometry("test", 1, 1, 0, 1, 1)
SETTING = torch.backends.cudnn.conv


def _image(dtype=torch.float32, device="meta"):
    return torch.empty(1, 4, 2, 2, dtype=dtype, device=device)


@pytest.fixture(params=["tf32", "none"])
def before(request):
    kept = SETTING.fp32_precision
    SETTING.fp32_precision = request.param
    yield request.param
    SETTING.fp32_precision = kept


@pytest.mark.parametrize("dtype, during", [(torch.float32, "ieee"), (torch.bfloat16, None)])
def test_forward_and_gradient_run_without_tf32(monkeypatch, before, dtype, during):
    seen = []
    for name in ("conv2d", "conv2d_input"):
        real = getattr(dense, name)
        monkeypatch.setattr(dense, name, lambda *a, real=real: seen.append(SETTING.fp32_precision) or real(*a))
    w = torch.empty(4, 4, dtype=dtype, device="meta")
    dense.convolve_dense(_image(dtype), w, None, None, GEOMETRY, "none")
    dense.convolve_dx(_image(dtype), w, GEOMETRY, 2, 2)
    assert seen == [during or before] * 2 and SETTING.fp32_precision == before


def test_an_error_leaves_the_setting_as_it_was(before):
    with pytest.raises(KeyError), convolves_in_fp32(_image()):
        raise KeyError
    assert SETTING.fp32_precision == before


def test_the_last_of_two_threads_restores_the_setting(before):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with convolves_in_fp32(_image()):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with convolves_in_fp32(_image()):
        thread.start()
        assert inside.wait(10)
    assert SETTING.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert SETTING.fp32_precision == before


def test_a_cpu_keeps_its_setting(before):
    with convolves_in_fp32(_image(device="cpu")):
        assert SETTING.fp32_precision == before
