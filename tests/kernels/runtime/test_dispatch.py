"""The variable GS_BACKEND counts in every call, also where it changes while a program runs."""

from types import SimpleNamespace

import pytest
import torch

from gs_kernels.runtime.device import AMD_SM, capabilities
from gs_kernels.runtime.dispatch import INTERPRET, Impl, UnsupportedError, choose, never, takes_cpu

IMPLS = tuple(Impl(name, lambda *args: None, never) for name in ("cpu", "ref"))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("GS_BACKEND", raising=False)


def test_the_variable_forces_an_implementation_from_when_it_is_set(monkeypatch):
    assert choose("op", IMPLS).name == "cpu"
    monkeypatch.setenv("GS_BACKEND", "ref")
    assert choose("op", IMPLS).name == "ref"
    monkeypatch.delenv("GS_BACKEND")
    assert choose("op", IMPLS).name == "cpu"


def test_a_name_that_is_none_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setenv("GS_BACKEND", "gpu")
    with pytest.raises(UnsupportedError, match="op: GS_BACKEND must be one of cpu, ref, got 'gpu'; unset it"):
        choose("op", IMPLS)


@pytest.mark.skipif(INTERPRET, reason="the CPU's own way is not taken by the interpreter")
@pytest.mark.parametrize("value, taken", [("cpu", True), ("", True), ("ref", False), ("triton", False)])
def test_callers_beside_the_ops_take_the_way_of_a_cpu_as_the_ops_do(monkeypatch, value, taken):
    monkeypatch.setenv("GS_BACKEND", value)
    assert takes_cpu(torch.ones(1)) == taken


def test_no_tensor_of_another_device_takes_the_way_of_a_cpu():
    assert not takes_cpu(torch.ones(1, device="meta"))


@pytest.mark.parametrize("hip, sm", [(None, 94), ("6.4", AMD_SM)])
def test_an_amd_gpu_takes_the_tiles_that_are_compiled_for_it(monkeypatch, hip, sm):
    properties = SimpleNamespace(name="A GPU", major=9, minor=4, multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert capabilities.__wrapped__(0).sm == sm
