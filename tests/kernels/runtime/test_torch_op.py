"""Ops work wherever torch ops do: opcheck, one compiled graph, export, checkpoints, traces for a GPU elsewhere."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gs_kernels import (
    PerChannel,
    PerGroup,
    PerTensor,
    choose_qparams,
    dequantize,
    dynamic_fake_quant,
    fake_quant,
    minmax,
    observe_fake_quant,
    quantize,
)
from gs_kernels.runtime.dispatch import INTERPRET, triton_refuses
from tests.helpers import DEVICE, relative_rms, same_bits
from tests.kernels.traces import pretend_sm_90, traced_launches

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced", allow_module_level=True)

OPS = torch.ops.gs_kernels


def inputs(channels=4, learned=True):
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    x = torch.randn(4, 6, 8, generator=generator, device=DEVICE).requires_grad_()
    scale = torch.full((channels,), 0.1, device=DEVICE).requires_grad_(learned)
    return x, scale, torch.zeros(channels, device=DEVICE).requires_grad_(learned)


def test_opcheck_of_every_op():
    x, scale, zero = inputs()
    codes = quantize(x, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0))
    low, high = torch.full((4,), -1.0, device=DEVICE), torch.full((4,), 2.0, device=DEVICE)
    last = x.detach().transpose(1, 2).requires_grad_()  # strides that results must keep
    calls = {
        OPS.fake_quant: [(x, scale, zero, -8, 7, 0, 0, ""), (last, *inputs(6)[1:], -8, 7, 2, 0, "")],
        OPS.fake_quant_backward: [
            (x.detach(), x.detach(), scale.detach(), zero.detach(), -8, 7, 0, 0, True, False, ""),
            (last.detach(), last.detach(), scale.detach(), zero.detach(), -8, 7, 0, 0, False, True, ""),
        ],
        OPS.quantize: [(x.detach(), scale.detach(), zero.detach(), 0, 255, 0, 0, "")],
        OPS.dequantize: [(codes, scale.detach(), zero.detach(), 0, 0, torch.bfloat16, "")],
        OPS.minmax: [(last.detach(), 2, 0, ""), (x.detach(), -1, 16, "")],
        OPS.choose_qparams: [(low, high, -8, 7, False, "")],
        OPS.dynamic_fake_quant: [(last, -8, 7, True, -1, 16, "")],
        OPS.observe_fake_quant: [(x, scale[:1].detach(), zero[:1].detach(), -8, 7, "")],
    }
    for op, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


def step(x, scale, zero):
    """One of everything that a training step calls."""
    w, s, z = dynamic_fake_quant(x, qmin=-8, qmax=7, symmetric=True, granularity=PerGroup(8))
    y = fake_quant(w * 1.5, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0))
    y, low, high = observe_fake_quant(y, s[:1], z[:1], qmin=-8, qmax=7)
    s2, z2 = choose_qparams(low, high, qmin=0, qmax=255, symmetric=False)
    codes = quantize(y, s2, z2, qmin=0, qmax=255)
    return y.square().sum() + dequantize(codes, s2, z2).sum() + minmax(y)[1].sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_compiles_to_one_graph_with_the_same_gradients(backend):
    eager, traced = inputs(), inputs()
    loss = step(*eager)
    loss.backward()
    compiled = torch.compile(step, fullgraph=True, backend=backend)(*traced)
    compiled.backward()
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(relative_rms(b.grad, a.grad) < 1e-5 for a, b in zip(eager, traced, strict=True))


def test_a_compiled_graph_takes_new_sizes_without_new_code():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, scale, zero):
        return fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=PerChannel(1))

    for n, c in ((3, 5), (7, 11), (13, 2)):
        x = torch.randn(n, c, 17, device=DEVICE)
        y = run(x, torch.ones(c, device=DEVICE), torch.zeros(c, device=DEVICE))
        assert torch.equal(y, x.round().clamp(-8, 7))
    assert counter.frame_count == 1


class Quantized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 0.1))
        self.register_buffer("zero", torch.zeros(1))

    def forward(self, x):
        return fake_quant(x, self.scale, self.zero, qmin=-8, qmax=7)


def test_export_keeps_the_op_as_one_node_and_decomposes_it_on_request():
    net, x = Quantized(), torch.randn(3, 5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gs_kernels.fake_quant.default"]
    longer = torch.randn(7, 5)
    assert torch.equal(program.module()(longer), net(longer))


def test_checkpointing_recomputes_the_same_bits():
    def block(x, scale, zero):
        return fake_quant(x.relu(), scale, zero, qmin=-8, qmax=7, granularity=PerChannel(0)).square().sum()

    plain, again = inputs(), inputs()
    block(*plain).backward()
    torch.utils.checkpoint.checkpoint(block, *again, use_reentrant=False).backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(plain, again, strict=True))


ALLOCATION = {"detach", "empty_like", "new_empty", "view"}


@pytest.mark.parametrize(
    "granularity, axis, group, n", [(PerTensor(), -1, 0, 1), (PerChannel(1), 1, 0, 6), (PerGroup(8), -1, 8, 24)]
)
def test_traced_for_a_gpu_a_graph_holds_launches_that_write_only_results(granularity, axis, group, n, monkeypatch):
    """The device of a fake tensor decides. A launch that PyTorch thinks writes its inputs would copy them first."""
    pretend_sm_90(monkeypatch)

    def forward(x, scale, zero):
        return fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=granularity)

    def backward(x, scale, zero):
        return OPS.fake_quant_backward(x, x, scale, zero, -8, 7, axis, group, True, False, "")

    def dynamic(x):
        return dynamic_fake_quant(x, qmin=-8, qmax=7, symmetric=True, granularity=PerGroup(8))

    with FakeTensorMode():
        x = torch.empty(4, 6, 8, device="cuda")
        args = x, torch.empty(n, device="cuda"), torch.empty(n, device="cuda")
        launches, aten = traced_launches(forward, *args)
        assert launches == [["y_ptr"]] and aten <= ALLOCATION
        launches, aten = traced_launches(backward, *args)
        assert launches == [["dx_ptr", "dscale_ptr"]] and aten <= ALLOCATION | {"sum"}
        launches, aten = traced_launches(dynamic, x)
        assert launches == [["y_ptr", "scale_ptr", "zero_ptr"]] and aten <= ALLOCATION


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to capture a graph on")
def test_a_cuda_graph_replays_a_training_step():
    x, scale, zero = inputs()

    def run():
        return torch.autograd.grad(step(x, scale, zero), (x, scale, zero))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(captured, run(), strict=True))


def test_importing_the_ops_imports_no_triton():
    code = "import sys, gs_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_source_is_an_argument_so_that_compiler_caches_notice_edits(monkeypatch):
    """Caches know an op by its name and arguments; its body is hashed into one of them."""
    from gs_kernels.runtime.torch_op import SOURCE

    x, scale, zero = inputs(1, learned=False)
    graph = make_fx(lambda x: fake_quant(x, scale, zero, qmin=-8, qmax=7), tracing_mode="real")(x.detach()).graph
    (node,) = [node for node in graph.nodes if "gs_kernels" in str(node.target)]
    assert node.args[-1] == SOURCE and len(SOURCE) == 12


@pytest.mark.skipif(INTERPRET, reason="the interpreter takes CPU tensors")
def test_forward_mode_is_refused_and_not_taken_for_zero():
    x, scale, zero = torch.randn(4, 6, device=DEVICE), torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)

    def rounded(x):
        return fake_quant(x, scale, zero, qmin=-8, qmax=7)

    with pytest.raises(NotImplementedError, match=r"fake_quant: no forward-mode derivative \(jvp\); use backward"):
        torch.func.jvp(rounded, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            rounded(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.equal(rounded(x), rounded(x.clone()))


def test_reasons_belong_to_one_call():
    x = torch.ones(1)
    first = triton_refuses(x)
    first.append("and more")
    assert triton_refuses(x) == first[:-1] != []
