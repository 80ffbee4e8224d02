"""What launches ask Triton to compile is collected without a GPU and without compiling it."""

import pickle

import pytest
import torch

from gs_kernels.qmatmul.tune import make_weight
from gs_kernels.runtime.dispatch import INTERPRET, UnsupportedError, meta_tensors_run_kernels, triton_refuses
from gs_kernels.runtime.opspec import specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels import aot
from gs_kernels.pack.layouts import PackedWeight


def _spec(name: str):
    return next(spec for spec in specs() if spec.name == name)


def _call(name: str, shape: int = 1, dtype: torch.dtype = torch.float32):
    spec = _spec(name)
    case = spec.make(spec.test_shapes[shape], dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    return aot.spec_call(spec, case)


def test_a_call_of_an_op_gives_each_of_its_kernels_once_those_of_its_backward_pass_too():
    call = _call("slb_weight")
    with aot.collect_launches("sm_90") as kernels:
        call()
        call()
    assert [kernel.name for kernel in kernels] == ["_slb_weight_kernel", "_slb_weight_bwd_kernel"]


def test_what_is_collected_compiles_to_what_a_launch_looks_up():
    call = _call("choose_qparams", 0)
    (kernel,) = aot.collect(call, "sm_90")
    with meta_tensors_run_kernels(), aot.compile_launches("sm_90") as compiled:
        call()
    assert [made.hash for made in compiled] == [kernel.compile().hash]


def test_a_collected_kernel_can_be_sent_to_another_process():
    (kernel,) = aot.collect(_call("choose_qparams", 0), "sm_90")
    copy = pickle.loads(pickle.dumps(kernel))
    assert copy.fn is kernel.fn and copy.compile().hash == kernel.compile().hash


def test_counts_of_rows_and_parts_of_k_share_the_code_of_a_product():
    def call():
        for k in (2048, 4096, 8192):
            weight = make_weight(4, 4096, k, 128, torch.bfloat16, "meta")
            for m in (1, 3, 16):
                _spec("qmatmul").run(torch.empty(m, k, dtype=torch.bfloat16, device="meta"), weight)

    kernels = [kernel for kernel in aot.collect(call, "sm_90") if kernel.name == "_qmatmul_kernel"]
    assert len(kernels) == 1


def test_lowering_ends_at_the_stage_that_is_asked_for():
    (kernel,) = aot.collect(_call("choose_qparams", 0), "sm_90")
    assert "tt.store" in str(kernel.lower("ttir")[0])
    _, metadata = kernel.lower("llir")
    assert metadata["shared"] == 0
    with pytest.raises(ValueError, match="stage must be one of source, ttir, ttgir, llir, ptx, cubin, got 'sass'"):
        kernel.lower("sass")


def test_an_argument_becomes_a_constant_or_another_type():
    (kernel,) = aot.collect(_call("quantize_rows"), "sm_90")
    name = next(name for name, type_ in kernel.signature.items() if type_ == "i32")
    one = kernel.with_argument(name, "constexpr", 1)
    path = (list(kernel.signature).index(name),)
    assert one.signature[name] == "constexpr" and one.constexprs[path] == 1 and kernel.signature[name] == "i32"
    assert f"%{name}: i64" in str(kernel.with_argument(name, "i64").lower()[0])


def test_ops_refuse_for_meta_tensors_what_their_launchers_refuse(monkeypatch):
    codes, scale = (torch.empty(8, n, dtype=t, device="meta") for n, t in ((64, torch.uint8), (1, torch.float32)))
    weight = PackedWeight(codes, scale, 8.0, None, 4, (8, 128), 128, "canonical")
    monkeypatch.setenv("GS_BACKEND", "triton")
    with pytest.raises(UnsupportedError, match="needs the planar layout, got canonical"):
        aot.collect(lambda: _spec("qmatmul").run(torch.empty(1, 128, device="meta"), weight), "sm_90")


def test_meta_tensors_and_triton_are_as_before_afterwards():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def state():
        return JITFunction.run, JITFunction._do_compile, driver._active, triton_refuses(torch.empty(1, device="meta"))

    before = state()
    with pytest.raises(KeyError), aot.collect_launches("sm_90"):
        raise KeyError
    assert state() == before and before[-1] == ["needs a CUDA tensor, got meta"]
