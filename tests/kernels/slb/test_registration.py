"""SLB works wherever torch ops do: opcheck, one compiled graph with its optimizer step, export, traces for a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gs_kernels import slb_adamw_, slb_pack, slb_sgd_, slb_weight
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms, same_bits
from tests.kernels.traces import pretend_sm_90, traced_launches

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced", allow_module_level=True)

OPS = torch.ops.gs_kernels


def inputs(planes=4, device=DEVICE):
    """logits, levels, temperature, scale of a weight `[4, 3, 2, 2]`; and dw."""
    logits = torch.linspace(-2, 2, 4 * planes * 12, device=device).cos().view(4, planes, 3, 2, 2)
    levels = torch.linspace(-1, 1, max(2, planes), device=device)
    scale, dw = torch.linspace(0.5, 2, 4, device=device), torch.linspace(-1, 1, 48, device=device).view(4, 3, 2, 2)
    return (logits, levels, torch.full((1,), 0.5, device=device), scale), dw


def state(logits):
    one = torch.ones(1, device=logits.device)
    return torch.zeros_like(logits), torch.zeros_like(logits), one, torch.zeros_like(one, dtype=torch.bool)


def test_opcheck_of_every_op():
    (logits, levels, tau, scale), dw = inputs()
    avg, sq, one, frozen = state(logits)
    learned = logits.clone().requires_grad_(), levels, tau, scale.clone().requires_grad_()
    numbers = 0.1, 0.9, 0.99, 1e-8, 0.1
    calls = {
        OPS.slb_weight: [
            (*learned, [4, 3, 2, 2], False, False, torch.float32, ""),
            (*learned, [4, 3, 2, 2], True, True, torch.float16, ""),
        ],
        OPS.slb_weight_backward: [
            (dw, logits, levels, tau, scale, False, True, True, ""),
            (dw, logits, levels, tau, None, True, False, True, ""),
        ],
        OPS.slb_pack: [(logits, 2, "")],
        OPS.slb_adamw_: [(logits.clone(), dw, levels, tau, avg, sq, one, scale, None, frozen, *numbers, "")],
        OPS.slb_sgd_: [
            (logits.clone(), dw, levels, tau, None, None, one, frozen, 0.0, 0.0, 0.1, False, ""),
            (logits.clone(), dw, levels, tau, avg, scale, None, None, 0.1, 0.9, 0.1, True, ""),
        ],
    }
    for op, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


def training_step(logits, levels, tau, scale, avg, sq, step, frozen, lr):
    """The weight, dW, and what the optimizer makes of it."""
    w = slb_weight(logits.detach(), levels, tau, scale, memory_format=torch.channels_last)
    dw = w * 2 - 0.1
    slb_adamw_(logits, dw, levels, tau, avg, sq, step, scale, lr=lr, frozen=frozen)
    return w


def test_a_training_step_compiles_to_one_graph_that_updates_in_place():
    compiled = torch.compile(training_step, fullgraph=True)
    found = []
    for step in (compiled, training_step):
        (logits, *mix), _ = inputs()
        avg, sq, one, frozen = state(logits)
        for _ in range(2):
            w = step(logits, *mix, avg, sq, one, frozen, 0.1 * one)
        kept = [t.clone() for t in (logits, avg, sq)]
        step(logits, *mix, avg, sq, one, ~frozen, 0.1 * one)
        assert all(same_bits(a, b) for a, b in zip(kept, (logits, avg, sq), strict=True))
        found.append((w, logits, avg, sq))
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(*found, strict=True))
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_the_same_in_a_compiled_graph():
    def loss(logits, scale, levels, tau):
        return slb_weight(logits, levels, tau, scale).square().sum()

    (logits, levels, tau, scale), _ = inputs()
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = logits.clone().requires_grad_(), scale.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(*leaves, levels, tau), leaves))
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        (logits, levels, tau, _), _ = inputs(planes=1, device="cpu")
        self.logits = torch.nn.Parameter(logits)
        self.register_buffer("levels", levels)
        self.register_buffer("tau", tau)

    def forward(self, x):
        return torch.nn.functional.conv2d(x, slb_weight(self.logits, self.levels, self.tau))


def test_export_keeps_the_op_as_one_node():
    net, x = Mixed(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gs_kernels.slb_weight.default", "aten.conv2d.default"]
    assert torch.equal(program.module()(x), net(x))


def launches(run, *args):
    return traced_launches(run, *args)[0]


def test_traced_for_a_gpu_launches_write_only_results_and_what_they_update(monkeypatch):
    pretend_sm_90(monkeypatch)
    with FakeTensorMode():
        (logits, levels, tau, scale), dw = inputs(device="cuda")
        avg, sq, one, frozen = state(logits)
        assert launches(slb_weight, logits, levels, tau, scale) == [["w_ptr"]]

        def backward(dw, logits, levels, tau):
            return OPS.slb_weight_backward(dw, logits, levels, tau, None, False, True, False, "")

        assert launches(backward, dw, logits, levels, tau) == [["da_ptr"]]
        assert launches(slb_pack, logits) == [["bytes_ptr"]]
        assert launches(training_step, logits, levels, tau, scale, avg, sq, one, frozen, one) == [
            ["w_ptr"],
            ["a_ptr", "avg_ptr", "sq_ptr"],
        ]

        def sgd(logits, dw, levels, tau, buffer, frozen):
            return slb_sgd_(logits, dw, levels, tau, buffer, lr=0.1, momentum=0.5, frozen=frozen)

        assert launches(sgd, logits, dw, levels, tau, avg, frozen) == [["a_ptr", "buf_ptr"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to capture a graph on")
def test_a_cuda_graph_replays_steps_that_follow_temperature_rate_and_flag():
    (logits, *mix), _ = inputs()
    avg, sq, one, frozen = state(logits)
    lr = 0.1 * one
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        training_step(logits, *mix, avg, sq, one, frozen, lr)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training_step(logits, *mix, avg, sq, one, frozen, lr)
    copies = [t.clone() for t in (logits, avg, sq)]
    mix[1].mul_(0.5)
    lr.mul_(0.1)
    graph.replay()
    training_step(copies[0], *mix, *copies[1:], one, frozen, lr)
    assert all(same_bits(a, b) for a, b in zip((logits, avg, sq), copies, strict=True))
    frozen.fill_(True)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip((logits, avg, sq), copies, strict=True))
