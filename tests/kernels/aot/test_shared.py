"""What tile rules choose fits the shared memory of each GPU, which is computed without machine code."""

import dataclasses

import pytest

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import OpSpec, specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels import aot
from gs_kernels.aot import __main__ as command
from gs_kernels.aot.shared import check_shared


def _only(op: str, name: str) -> OpSpec:
    """The op with one regime of its own."""
    spec = next(spec for spec in specs() if spec.name == op)
    return dataclasses.replace(spec, regimes=lambda every: (r for r in spec.regimes(True) if r[0] == name))


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_120"])
def test_few_fp32_rows_times_8_bits_in_groups_of_32_fit(target):
    (found,) = check_shared([_only("qmatmul", "w8-m16-g32-points-float32")], target, False)
    assert found[1:] == ("_qmatmul_kernel", found[2], "") and 16384 < found[2] <= 101376


def test_the_bytes_are_those_of_the_compiled_kernel():
    ((_, call),) = _only("qmatmul", "w4-m16-g128-middle-bfloat16").regimes(True)
    kernel = next(k for k in aot.collect(call, "sm_90") if k.name == "_qmatmul_kernel")
    assert kernel.shared_bytes() == kernel.compile().metadata.shared


def test_the_command_names_what_does_not_fit_and_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(command, "specs", lambda: (_only("qmatmul", "w4-m16-g128-middle-bfloat16"),))
    assert command.main(["--shared", "sample", "--target", "sm_90"]) == 0
    small = dataclasses.replace(aot.TARGETS["sm_90"], shared_per_block=16384)
    monkeypatch.setitem(aot.TARGETS, "sm_90", small)
    assert command.main(["--shared", "sample", "--target", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "_qmatmul_kernel: FAIL: must take at most 16384 bytes of shared memory, got" in out
    assert "1 kernels do not fit." in out
