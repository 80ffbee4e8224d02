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
from gs_kernels.aot.shared import TARGETS, check_shared
from gs_kernels.tuning import tables

WIDEST = (  # 8 or, of more rows, 4 bits in small groups with zero points, whole tiles; fp32 pixels gathered one by one
    ("qmatmul", "w8-m64-g32-points-bfloat16"),
    ("qmatmul", "w8-m256-g32-points-bfloat16"),
    ("qmatmul", "w4-m256-g32-points-bfloat16"),
    ("qmatmul_int8", "w8a8-m256-g128-middle"),
    ("qconv2d", "w8-128to256-28-b32-points-bfloat16"),
    ("qconv2d", "w8-3to256-8-b4-middle-float32"),
)


def _only(op: str, name: str) -> OpSpec:
    """The op with one regime of its own."""
    spec = next(spec for spec in specs() if spec.name == op)
    return dataclasses.replace(spec, regimes=lambda every: (r for r in spec.regimes(True) if r[0] == name))


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_120"])
def test_few_fp32_rows_times_8_bits_in_groups_of_32_fit(target):
    found, *_ = check_shared([_only("qmatmul", "w8-m16-g32-points-float32")], target, False)
    assert found[1:] == ("_qmatmul_kernel", found[2], "") and 16384 < found[2] <= 101376


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_tiles_of_the_rules_fit_every_gpu(target):
    found = list(check_shared([_only(*regime) for regime in WIDEST], target, False))
    assert {kernel for _, kernel, *_ in found} >= {"_qmatmul_kernel", "_qmatmul_int8_kernel", "_qconv2d_kernel"}
    assert [(name, wrong) for name, _, _, wrong in found if wrong] == []


def test_the_largest_tile_of_the_rules_fits_an_amd_gpu():
    ((_, call),) = _only("qmatmul", "w8-m256-g32-points-bfloat16").regimes(True)
    kernel, *_ = aot.collect(call, "gfx942")
    assert 32768 < kernel.compile().metadata.shared <= aot.TARGETS["gfx942"].shared_per_block


def test_a_tile_that_was_timed_with_4_bits_fits_with_8(tmp_path, monkeypatch):
    tile = {"block_m": 32, "block_n": 256, "warps": 4, "stages": 5, "programs": 0}
    timed = tables.Entry({"m": 32, "n": 14336, "k": 4096, "group": 128}, tile, 1.0)
    tables.write_table(tmp_path / "a.json", tables.Table("A GPU", 89, 132, {}, {"qmatmul_int8": (timed,)}))
    monkeypatch.setenv("GS_TUNING_DIR", str(tmp_path))
    tables.forget()
    try:
        names = "w4a8-m32-g128-middle", "w8a8-m32-g128-middle"
        (four, eight) = (next(check_shared([_only("qmatmul_int8", name)], "sm_89", False)) for name in names)
    finally:
        tables.forget()
    assert four[2:] == (82944, "") and eight[2] <= four[2]


def test_8_bit_floats_are_left_out_where_no_gpu_multiplies_them():
    only = _only("qmatmul_int8", "w4f8-m16-g128-middle")
    kernels = [{name for _, name, *_ in check_shared([only], target, False)} for target in ("sm_80", "sm_89")]
    assert "_qmatmul_int8_kernel" not in kernels[0] and "_qmatmul_int8_kernel" in kernels[1]


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
