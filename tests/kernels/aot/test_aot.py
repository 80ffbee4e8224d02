"""The AOT gate: every kernel compiles for real GPUs within its bounds, and the gate catches those that do not."""

import dataclasses
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import AotCase, specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
tl = pytest.importorskip("triton.language", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels import aot  # noqa: E402
from gs_kernels.aot import __main__ as command  # noqa: E402
from gs_kernels.aot import sass  # noqa: E402
from gs_kernels.aot.isa_text import classify_gcn  # noqa: E402
from gs_kernels.aot.sass import classify, find_cuobjdump, parse  # noqa: E402

OTHER_COMPILERS = {  # the bounds are those of Triton 3.9
    "3.8": {
        "qmatmul_int8-w4a8-m256-g32-sm_90": "stores to shared memory 24 times a turn",
        "qmatmul_fp8-w4f8-m256-sm_90": "spills 20 times",
    },
}


def _case(case: AotCase, target: str, name: str):
    version = ".".join(triton.__version__.split(".")[:2])
    cost = OTHER_COMPILERS.get(version, {}).get(name)
    known = pytest.mark.xfail(cost is not None, reason=f"compiled by Triton {version} it {cost}", strict=True)
    return pytest.param(case, target, id=name, marks=known)


CASES = [
    _case(case, target, f"{spec.name}-{case.name}-{target}")
    for spec in specs()
    for case in spec.aot
    for target in case.targets
]


@pytest.mark.parametrize("case, target", CASES)
def test_kernels_stay_within_the_bounds_of_their_spec(case: AotCase, target: str):
    found = {kernel.kernel: aot.check(kernel, case) for kernel in aot.reports(case, target)}
    assert not any(found.values()), found


@triton.jit
def _double_kernel(y_ptr, x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N).to(tl.float32)
    tl.store(y_ptr + offs, (x * 2).to(y_ptr.dtype.element_ty), mask=offs < N)


@triton.jit
def _row_max_kernel(y_ptr, x_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for n in range(0, N, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        acc = tl.maximum(acc, tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32))
    tl.store(y_ptr + row, tl.max(acc, 0))


@triton.jit
def _matmul_kernel(y_ptr, a_ptr, b_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + offs[None, :] * K + k + offs_k[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def _lost_body_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    # the result goes nowhere, so the compiler keeps nothing
    offs = tl.arange(0, BLOCK)
    _ = tl.load(x_ptr + offs) + tl.load(y_ptr + offs)


@triton.jit
def _trap_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)


def _meta(dtype=torch.float16):
    return torch.empty(1 << 16, dtype=dtype, device="meta")


def _double(n=1 << 16, block=1024, **options):
    _double_kernel[(triton.cdiv(n, block),)](_meta(), _meta(), n, BLOCK=block, enable_fp_fusion=False, **options)


DOUBLE = AotCase("double", launch=_double, elements=1024, max_instructions=16)


def _only(launch, target="sm_90", elements=1024):
    (kernel,) = aot.reports(AotCase("case", launch, elements), target)
    return kernel


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_a_streaming_kernel_is_read_right_on_every_target(target):
    kernel = _only(_double, target)
    access = 16 if target.startswith("sm_") else 8
    assert kernel.kernel == "_double_kernel" and kernel.target == target
    assert kernel.loads == kernel.stores == {access: 1}
    assert 0 < kernel.registers <= 32 and not kernel.spills and not kernel.shared_bytes
    assert kernel.occupancy.warps == {"sm_89": 48, "sm_120": 48, "gfx942": 32}.get(target, 64)
    assert aot.check(kernel, DOUBLE) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_loop_counts_per_turn_of_the_source_however_often_it_is_unrolled(target):
    kernel = _only(
        lambda: _row_max_kernel[(8,)](_meta(torch.float32), _meta(), 8192, BLOCK=1024, enable_fp_fusion=False), target
    )
    # 8 elements a thread: at least one conversion and one maximum for each, not once per unrolled copy
    assert kernel.loop_instructions > 0 and kernel.unroll > 1
    assert kernel.loads == {16: kernel.unroll}
    assert 2 <= kernel.per_element <= 5


@pytest.mark.parametrize("target, mma", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_the_matrix_instruction_of_the_hot_loop_is_named(target, mma):
    def launch():
        _matmul_kernel[(1,)](_meta(), _meta(), _meta(), 512, BLOCK=64, BLOCK_K=64, enable_fp_fusion=False)

    (kernel,) = aot.reports(AotCase("matmul", launch, elements=64 * 64), target)
    assert kernel.mma == mma
    wanted = AotCase("matmul", launch, elements=64 * 64, max_regs=255, mma="HGMMA", targets=(target,))
    assert any("multiply with HGMMA" in fact for fact in aot.check(kernel, wanted)) == (mma != "HGMMA")


def test_wgmmas_that_read_shared_memory_or_are_all_waited_for_are_caught():
    def launch():
        _matmul_kernel[(1,)](_meta(), _meta(), _meta(), 512, BLOCK=64, BLOCK_K=64, enable_fp_fusion=False)

    (kernel,) = aot.reports(AotCase("matmul", launch, elements=64 * 64), "sm_90")
    assert kernel.from_shared > 0
    wanted = AotCase("matmul", launch, elements=64 * 64, max_regs=255, overlapped=True, targets=("sm_90",))
    assert any("must feed wgmma from registers, got" in fact for fact in aot.check(kernel, wanted))
    fed = dataclasses.replace(kernel, from_shared=0, in_flight=0)
    assert any("must keep wgmmas in flight" in fact for fact in aot.check(fed, wanted))
    assert aot.check(dataclasses.replace(fed, in_flight=1), wanted) == []


def test_stores_to_shared_memory_are_caught():
    kernel = dataclasses.replace(_only(_double), opcodes=Counter(STS=5))
    found = aot.check(kernel, dataclasses.replace(DOUBLE, max_shared_stores=4))
    assert len(found) == 1 and "at most 4 times a turn, got 5" in found[0]


def test_a_call_that_never_returns_is_a_way_out_of_a_loop_and_hides_no_code():
    listing = """REG:8
        /*0000*/                   LDG.E R0, [R2.64] ;
        /*0010*/              @!P0 CALL.REL.NOINC 0x30 ;
        /*0020*/                   BRA 0x0 ;
        /*0030*/                   STG.E [R2.64], R0 ;
        /*0040*/                   EXIT ;
    """
    assert [ins.kind for ins in parse(listing).body] == ["load", "other", "other", "store", "exit"]
    returns = listing + "    /*0050*/                   RET.REL.NODEC R4 ;"
    assert [ins.kind for ins in parse(returns).body] == ["load", "other", "other"]
    both = listing.replace("/*0040*/                   EXIT", "/*0038*/ CALL.REL.NOINC 0x50 ;\n/*0040*/ EXIT")
    both += "    /*0050*/                   MUFU.RCP R4, R4 ;\n    /*0060*/                   RET.REL.NODEC R4 ;"
    assert [ins.kind for ins in parse(both).body] == ["load", "other", "other", "store", "other", "exit"]


def test_spills_are_caught():
    kernel = _only(lambda: _double(1 << 16, 8192, num_warps=1, maxnreg=32), elements=8192)
    assert kernel.spills
    assert any("spill" in fact for fact in aot.check(kernel, DOUBLE))


def test_too_many_registers_are_caught():
    found = aot.check(_only(_double), dataclasses.replace(DOUBLE, max_regs=8))
    assert len(found) == 1 and "at most 8 registers" in found[0]


def test_registers_may_be_bounded_for_an_older_triton(monkeypatch):
    kernel = _only(_double)
    case = dataclasses.replace(DOUBLE, max_regs=8, older_max_regs={"3.6": 255})
    monkeypatch.setattr(sys.modules[aot.check.__module__], "version", lambda name: "3.6.0")
    assert aot.check(kernel, case) == []
    monkeypatch.setattr(sys.modules[aot.check.__module__], "version", lambda name: "3.9.0")
    assert any("at most 8 registers" in fact for fact in aot.check(kernel, case))


def test_narrow_loads_are_caught():
    # a size that is no multiple of 16 keeps the mask from covering whole vectors
    kernel = _only(lambda: _double(65535))
    assert kernel.loads == {2: 8}
    assert any("16 at a time" in fact for fact in aot.check(kernel, DOUBLE))


def test_too_many_instructions_are_caught():
    found = aot.check(_only(_double), dataclasses.replace(DOUBLE, max_instructions=1.0))
    assert len(found) == 1 and "at most 1.0 instructions per element" in found[0]


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_a_body_that_was_optimized_away_is_caught(target):
    kernel = _only(lambda: _lost_body_kernel[(1,)](_meta(), _meta(), BLOCK=1024, enable_fp_fusion=False), target)
    assert any("left a trap or removed" in fact for fact in aot.check(kernel, DOUBLE))


def test_a_trap_is_caught():
    kernel = _only(lambda: _trap_kernel[(1,)](_meta(), _meta(), BLOCK=1024, enable_fp_fusion=False))
    assert kernel.opcodes["BPT"] == 1
    assert any("left a trap or removed" in fact for fact in aot.check(kernel, DOUBLE))


def test_a_block_that_fits_no_processor_is_caught():
    kernel = dataclasses.replace(_only(_double), occupancy=aot.occupancy(aot.TARGETS["sm_90"], 64, 230 * 1024, 8))
    assert any("one block must fit" in fact for fact in aot.check(kernel, DOUBLE))


def test_a_case_that_launches_nothing_is_an_error():
    with pytest.raises(RuntimeError, match=r"idle.launch.* must launch a kernel"):
        aot.reports(AotCase("idle", lambda: None, 1), "sm_90")


def test_an_unknown_target_is_named_with_the_known_ones():
    with (
        pytest.raises(
            ValueError, match="target must be one of sm_80, sm_89, sm_90, sm_100, sm_120, gfx942, got 'sm_35'"
        ),
        aot.compile_launches("sm_35"),
    ):
        pass


def test_a_process_that_interprets_kernels_is_refused(monkeypatch):
    monkeypatch.setattr("gs_kernels.aot.compile.INTERPRET", True)
    with pytest.raises(RuntimeError, match="got TRITON_INTERPRET=1; unset it"), aot.compile_launches("sm_90"):
        pass


def test_a_missing_disassembler_is_named(monkeypatch, tmp_path):
    class NoTools:
        @property
        def cuobjdump(self):
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(triton.knobs, "nvidia", NoTools())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs cuobjdump, got none in triton/backends/nvidia/bin or on PATH"):
        find_cuobjdump()


def test_a_kernel_is_disassembled_once_for_all_processes_and_again_where_the_text_is_broken(monkeypatch, tmp_path):
    runs = []

    def disassembled(cubin):
        runs.append(cubin)
        return disassemble(cubin)

    def read():
        sass.read_cubin.cache_clear()  # as another process
        return sass.read_cubin(cubin)

    with aot.compile_launches("sm_90") as kernels:
        _double()
    cubin = kernels[0].asm["cubin"]
    disassemble = sass.disassemble
    monkeypatch.setattr(sass, "disassemble", disassembled)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = read()
    assert code == read() == parse(disassemble(cubin)) and runs == [cubin]
    (kept,) = tmp_path.glob("*/*.zlib")
    kept.write_bytes(kept.read_bytes()[:-5])
    assert read() == code and len(runs) == 2
    assert read() == code and len(runs) == 2


@pytest.mark.parametrize("max_regs, code, verdict", [(128, 0, "PASS"), (8, 1, "FAIL: must use at most 8 registers")])
def test_the_command_prints_a_verdict_per_kernel_and_exits_with_it(monkeypatch, capsys, max_regs, code, verdict):
    case = dataclasses.replace(DOUBLE, max_regs=max_regs)
    monkeypatch.setattr(command, "specs", lambda: (SimpleNamespace(name="twice", aot=(case,)),))
    assert command.main(["--op", "twice", "--target", "sm_90"]) == code
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("twice/double")]
    assert "sm_90" in line and "_double_kernel" in line and verdict in line


@pytest.mark.parametrize("main, broken", [(None, True), ("_double_kernel", True), ("_other_kernel", False)])
def test_bounds_are_for_the_kernel_that_a_case_names(main, broken):
    case = dataclasses.replace(DOUBLE, max_regs=8, mma="HGMMA", main=main)
    (kernel,) = aot.reports(case, "sm_90")
    assert len(aot.check(kernel, case)) == 2 * broken
    spilled = dataclasses.replace(kernel, spills=3)
    assert "must not spill registers, got 3 stack accesses" in aot.check(spilled, case)


def test_a_wrapped_kernel_is_compiled_too_and_nothing_stays_changed():
    from torch._library.triton import is_wrap_triton_enabled
    from triton.runtime import driver

    run, active, wrapped = type(_double_kernel).run, driver._active, is_wrap_triton_enabled()
    collected = []

    def fail_inside():
        with aot.compile_launches("sm_90") as kernels:
            launch = torch.library.wrap_triton(_double_kernel)[(64,)]
            launch(_meta(), _meta(), 1 << 16, BLOCK=1024, enable_fp_fusion=False)
            collected.extend(kernels)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [kernel.name for kernel in collected] == ["_double_kernel"]
    assert (type(_double_kernel).run, driver._active, is_wrap_triton_enabled()) == (run, active, wrapped)


def test_one_specialisation_is_listed_once_and_two_are_listed_twice():
    with aot.compile_launches("sm_90") as kernels:
        for n in (1 << 16, 1 << 17, 65535):
            _double(n)
    assert len(kernels) == 2


@pytest.mark.parametrize(
    "registers, shared, warps, blocks, limiter",
    [
        (32, 0, 4, 16, "warps"),
        (64, 0, 8, 4, "registers"),
        (168, 0, 8, 1, "registers"),
        (32, 100 * 1024, 4, 2, "shared"),
    ],
)
def test_occupancy_follows_the_rules_of_the_hardware(registers, shared, warps, blocks, limiter):
    held = aot.occupancy(aot.TARGETS["sm_90"], registers, shared, warps)
    assert (held.blocks, held.warps, held.limiter) == (blocks, blocks * warps, limiter)


@pytest.mark.parametrize(
    "opcode, kind, nbytes",
    [
        ("LDG.E.LTC128B.64.CONSTANT", "load", 8),
        ("LDG.E.ENL2.256", "load", 32),
        ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "load", 16),
        ("UTMALDG.2D", "load", 16),
        ("STG.E.U8", "store", 1),
        ("LDL.64", "spill", 0),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "mma", 0),
        ("LDGDEPBAR", "other", 0),
        ("LDS.128", "other", 0),
    ],
)
def test_nvidia_opcodes_are_read_by_their_modifiers(opcode, kind, nbytes):
    assert classify(opcode) == (kind, nbytes)


@pytest.mark.parametrize(
    "opcode, kind, nbytes",
    [
        ("buffer_load_dwordx4", "load", 16),
        ("global_load_ushort", "load", 2),
        ("buffer_load_short_d16_hi", "load", 2),
        ("global_store_byte", "store", 1),
        ("global_atomic_add_f32", "store", 4),
        ("scratch_store_dword", "spill", 0),
        ("v_mfma_f32_32x32x8_bf16", "mma", 0),
        ("ds_read_b128", "other", 0),
    ],
)
def test_amd_opcodes_are_read_by_their_names(opcode, kind, nbytes):
    assert classify_gcn(opcode) == (kind, nbytes)
