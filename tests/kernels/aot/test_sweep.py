"""Kernels compile with every integer argument 1, which a launch makes a constant of, and with 64 bits."""

import pytest
import torch

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import OPS, specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
tl = pytest.importorskip("triton.language", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels import aot  # noqa: E402
from gs_kernels.aot import __main__ as command  # noqa: E402
from gs_kernels.aot.sweep import forced, sample, spec_kernels, sweep  # noqa: E402

FOLDERS = {spec.name: folder for folder in OPS for spec in specs() if f".{folder}." in spec.run.__module__}


@pytest.mark.parametrize("folder", OPS)
def test_integer_arguments_may_be_1_or_have_64_bits(folder):
    kernels = spec_kernels([spec for spec in specs() if FOLDERS[spec.name] == folder], "sm_90")
    assert sweep(kernels, every=False) == []


@triton.jit
def _fill_kernel(y_ptr, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if SPLIT:
        y_ptr += M.to(tl.int64) * N
    tl.store(y_ptr + offs, 0.0, mask=offs < N)


def _fill(m: int, n: int, split: bool):
    y = torch.empty(8, device="meta")
    return aot.collect(lambda: _fill_kernel[(1,)](y, m, n, SPLIT=split, BLOCK=16), "sm_90")


def test_a_method_of_an_argument_that_can_be_a_constant_is_found():
    kernels = _fill(3, 5, False) + _fill(3, 5, True)
    for every in (True, False):
        failures = sweep(kernels, every)
        assert any(f.startswith("_fill_kernel with M = 1: ") or "M, N = 1: " in f for f in failures)
        assert all("has no attribute" in f or "no attribute 'to'" in f for f in failures) and failures


def test_a_kernel_that_is_sound_passes():
    assert sweep(_fill(3, 5, False)) == []


def test_every_argument_is_forced_by_itself_and_with_the_others():
    done = [what for what, _ in forced(_fill(3, 5, False))]
    assert done == [
        "_fill_kernel with M, N = 1",
        "_fill_kernel with M, N of 64 bits",
        "_fill_kernel with M = 1",
        "_fill_kernel with M of 64 bits",
        "_fill_kernel with N = 1",
        "_fill_kernel with N of 64 bits",
    ]


def test_a_sample_holds_every_flag_and_every_kind_of_number():
    kernels = [*_fill(3, 5, False), *_fill(4, 5, False), *_fill(3, 5, True), *_fill(1, 5, True)]
    chosen = sample(kernels)
    assert {k.constexprs[3,] for k in chosen} == {False, True}
    assert {k.signature["M"] for k in chosen} == {"i32", "constexpr"} and len(chosen) < len(kernels)


def test_the_command_sweeps_the_kernels_of_an_op(monkeypatch, capsys):
    monkeypatch.setattr(
        command, "spec_kernels", lambda known, target: _fill(3, 5, [s.name for s in known] == ["slb_pack"])
    )
    assert command.main(["--op", "slb_pack", "--sweep"]) == 1
    assert "1 kernels swept for sm_90, 2 failures." in capsys.readouterr().out
    assert command.main(["--op", "slb_codes", "--sweep"]) == 0
