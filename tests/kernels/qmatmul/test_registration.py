"""Packed products work wherever torch ops do: opcheck, one compiled graph, export, a package that runs without us."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gs_kernels import pack_weight, qmatmul, qmatmul_fp8, qmatmul_int8, quantize_rows, row_sums
from gs_kernels.pack.schema import flatten
from gs_kernels.qmatmul.ref import qmatmul_ref
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms
from tests.kernels.traces import pretend_sm_90, traced_launches

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced", allow_module_level=True)

OPS = torch.ops.gs_kernels


def weight(n=6, k=256, bits=4, group=128, zero=None, layout="planar", device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, k // group, generator=generator).add(1).div(k**0.5 * 2**bits)
    return pack_weight(codes, scale, zero, bits=bits, group_size=group, layout=layout).to(device)


def inputs(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_opcheck_of_every_op():
    x, bias = inputs(2, 3, 256).requires_grad_(), inputs(6).requires_grad_()
    points = weight(zero=torch.full((6, 2), 7.5), layout="canonical")
    codes, scale = quantize_rows(x.detach())
    static = (codes.transpose(0, 1), scale.new_ones(1), scale.new_ones(1), scale.new_ones(6))
    calls = {
        OPS.qmatmul: [
            (x, *flatten(w), b, activation, "")
            for w, b, activation in ((weight(), bias, "silu"), (points, None, "none"))
        ],
        OPS.qmatmul_dx: [(inputs(5, 6).requires_grad_(), *flatten(points), "")],
        OPS.qmatmul_int8: [(*static[:2], *flatten(points), bias.detach(), *static[2:], "relu", torch.bfloat16, "")],
        OPS.qmatmul_fp8: [(x.detach(), *flatten(points), None, "gelu", "")],
        OPS.quantize_rows: [(x.detach().transpose(0, 1), torch.float8_e4m3fn, "")],
    }
    for op, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


def test_a_step_through_packed_layers_is_one_graph_with_the_same_gradients():
    up, down, last = weight(24, 256), weight(8, 24, bits=2, group=24), weight(5, 8, group=8)
    bias = inputs(24).requires_grad_()

    def step(x):
        y = qmatmul(qmatmul(x, up, bias, activation="gelu"), down)
        codes, scale = quantize_rows(y)
        return y.square().sum() + qmatmul_int8(codes, scale, last).sum()

    eager, traced = inputs(3, 256).requires_grad_(), inputs(3, 256).requires_grad_()
    wanted = torch.autograd.grad(step(eager), (eager, bias))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(traced), (traced, bias))
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.packed = weight(layout="canonical", device="cpu")
        self.register_buffer("codes", self.packed.codes)
        self.register_buffer("scale", self.packed.scale)
        self.register_buffer("bias", torch.linspace(-1, 1, 6))

    def forward(self, x):
        return qmatmul(x, replace(self.packed, codes=self.codes, scale=self.scale), self.bias, activation="silu")


RUN_PACKAGE = """
import sys, torch
layer = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
assert layer(torch.zeros(9, 256)).shape == (9, 6)
sys.exit("gs_kernels" in sys.modules)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is on the CPU, as its package")
def test_an_exported_layer_is_one_node_and_its_package_runs_in_a_process_that_never_saw_us(tmp_path):
    layer, x = Layer(), inputs(5, 256)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gs_kernels.qmatmul.default"]
    assert torch.equal(program.module()(inputs(7, 256)), layer(inputs(7, 256)))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    torch.save((x, layer(x)), tmp_path / "call.pt")
    command = [sys.executable, "-c", RUN_PACKAGE, package, str(tmp_path / "call.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ALLOCATION = {"alias", "detach", "new_empty", "view"}


def test_traced_for_a_gpu_each_regime_launches_what_it_says_and_writes_only_results(monkeypatch):
    """Few rows: the product and, split, its sum. Many: the weight once, then the library's product."""
    pretend_sm_90(monkeypatch)

    like = weight(96, 4096, device="cpu")

    def forward(x, codes, scale, bias):
        return qmatmul(x, replace(like, codes=codes, scale=scale), bias, activation="relu")

    def backward(dy, codes, scale):
        w = replace(like, codes=codes, scale=scale)
        return OPS.qmatmul_dx(dy, *flatten(w), "")

    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = torch.empty(32, 96, 32, dtype=torch.int16, device="cuda"), torch.empty(96, 32, device="cuda")
        bias = torch.empty(96, device="cuda", dtype=torch.bfloat16)
        for m, written, aten in (
            (1, [["parts_ptr"], ["y_ptr"]], set()),
            (200, [["parts_ptr"], ["y_ptr"]], set()),
            (2049, [["w_ptr"]], {"addmm", "relu", "t", "permute"}),
        ):
            x = torch.empty(m, 4096, device="cuda", dtype=torch.bfloat16)
            launches, called = traced_launches(forward, x, *parts, bias)
            assert launches == written and called <= ALLOCATION | aten, (m, launches, called)
        launches, called = traced_launches(backward, torch.empty(3, 96, device="cuda"), *parts)
        assert launches == [["w_ptr"]] and called <= ALLOCATION | {"mm"}


def test_traced_for_a_gpu_8_bit_rows_stay_8_bit(monkeypatch):
    pretend_sm_90(monkeypatch)

    like = weight(96, 256, device="cpu")

    def forward(x, one, codes, scale, sums):
        w = replace(like, codes=codes, scale=scale)
        rows, x_scale = quantize_rows(x)
        dynamic = qmatmul_int8(rows, x_scale, w) + qmatmul_fp8(x, w)
        return qmatmul_int8(rows, one, w, x_zero=one, code_sums=sums) + dynamic

    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = torch.empty(2, 96, 32, dtype=torch.int16, device="cuda"), torch.empty(96, 2, device="cuda")
        x, one = (torch.empty(*sizes, device="cuda") for sizes in ((40, 256), (1,)))
        sums = torch.empty(96, 2, dtype=torch.int32, device="cuda")
        launches, called = traced_launches(forward, x, one, *parts, sums)
    fp8 = [["codes_ptr", "scale_ptr", "sums_ptr"], ["y_ptr"]]
    assert launches == [["codes_ptr", "scale_ptr"], ["y_ptr"], *fp8, ["y_ptr"]]
    assert called <= ALLOCATION | {"mul", "add"}


def test_row_sums_are_those_of_the_real_values():
    w = weight(zero=torch.full((6, 2), 7.5))
    with pytest.warns(DeprecationWarning, match=r"row_sums: qmatmul_int8 now takes code_sums"):
        sums = row_sums(w)
    assert torch.allclose(sums, qmatmul_ref(torch.ones(1, 256, device=DEVICE), w)[0], atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to capture a graph on")
def test_a_cuda_graph_replays_packed_products():
    w, x = weight(256, 256), inputs(8, 256)

    def run():
        codes, scale = quantize_rows(x)
        return qmatmul(x, w), qmatmul_int8(codes, scale, w)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
