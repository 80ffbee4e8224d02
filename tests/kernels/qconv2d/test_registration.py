"""Packed convolutions work wherever torch ops do: opcheck, one compiled graph, export, launches traced for a GPU."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gs_kernels import code_sums, pack_weight, qconv2d, qconv2d_int8
from gs_kernels.pack.schema import flatten
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, relative_rms
from tests.kernels.traces import pretend_sm_90, traced_launches

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced", allow_module_level=True)

OPS = torch.ops.gs_kernels


def weight(o=6, k=72, bits=4, group=None, zero=None, layout="planar", device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (o, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(o, k // (group or k), generator=generator).add(1).div(k**0.5 * 2**bits)
    return pack_weight(codes, scale, zero, bits=bits, group_size=group, layout=layout).to(device)


def image(*sizes, seed=0):
    x = torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def codes_of(x):
    return x.mul(40).clamp(-128, 127).to(torch.int8)


def one(value=1):
    return torch.full((1,), float(value), device=DEVICE)


def test_opcheck_of_every_op():
    x, residual = image(2, 8, 5, 6).requires_grad_(), image(2, 6, 3, 3, seed=1).requires_grad_()
    bias = torch.randn(6, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    points = weight(zero=torch.full((6, 1), 7.5).index_fill_(0, torch.tensor(0), 7), layout="canonical")
    geometry = [3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    codes, requant = codes_of(x.detach()), (residual.detach(), None, None, one(0.1), one(3))
    eight = (codes, one(), *flatten(points), bias.detach(), geometry, one(5), code_sums(points), *requant)
    calls = {
        OPS.qconv2d: [
            (x, *flatten(weight()), bias, residual, geometry, "silu", False, ""),
            (x, *flatten(points), None, None, geometry, "none", True, ""),
        ],
        OPS.qconv2d_dx: [(image(2, 6, 3, 3).requires_grad_(), *flatten(points), geometry, 5, 6, "")],
        OPS.qconv2d_int8: [(*eight, "relu", torch.bfloat16, False, "")],
    }
    for op, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(op.default, args)


def test_a_step_through_packed_convolutions_is_one_graph_with_the_same_gradients():
    first, second, third = weight(16, 72), weight(16, 9, bits=2), weight(5, 16, bits=8)
    bias = torch.ones(16, device=DEVICE, requires_grad=True)

    def step(x):
        y = qconv2d(x, first, bias, kernel_size=3, padding="same", activation="hardswish")
        y = qconv2d(y, second, kernel_size=3, groups=16, residual=y[:, :, 1:-1, 1:-1])
        codes = codes_of(y.detach())
        whole = qconv2d_int8(codes, one(), third, kernel_size=1, x_zero=one(2), out_scale=one(0.5), activation="relu6")
        return y.square().sum() + whole.float().sum()

    eager, traced = image(2, 8, 6, 5).requires_grad_(), image(2, 8, 6, 5).requires_grad_()
    wanted = torch.autograd.grad(step(eager), (eager, bias))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(traced), (traced, bias))
    assert all(relative_rms(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.packed = weight(layout="canonical")
        self.register_buffer("codes", self.packed.codes)
        self.register_buffer("scale", self.packed.scale)

    def forward(self, x):
        return qconv2d(x, replace(self.packed, codes=self.codes, scale=self.scale), kernel_size=3, padding=1)


def test_an_exported_layer_is_one_node_for_any_batch_and_size():
    layer, x = Layer(), image(3, 8, 7, 9)
    free = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(free,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "gs_kernels.qconv2d.default" in targets and not any("aten.conv" in target for target in targets)
    other = image(2, 8, 4, 11)
    assert torch.equal(program.module()(other), layer(other))


ALLOCATION = {"detach", "new_empty", "view", "empty", "permute"}


def test_traced_for_a_gpu_each_way_launches_what_it_says_and_writes_only_results(monkeypatch):
    """Few pixels: the product and, split, its sum. Many: the product. Single channels: a kernel of their own."""
    pretend_sm_90(monkeypatch)
    like, single = weight(96, 2304, device="cpu"), weight(96, 9, device="cpu")

    def forward(x, codes, scale):
        return qconv2d(x, replace(like, codes=codes, scale=scale), kernel_size=3, padding=1, activation="relu")

    def alone(x, codes, scale):
        return qconv2d(x, replace(single, codes=codes, scale=scale), kernel_size=3, groups=96)

    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = torch.empty(18, 96, 32, dtype=torch.int16, device="cuda"), torch.empty(96, 1, device="cuda")
        for size, written in ((7, [["y_ptr"], ["y_ptr"]]), (200, [["y_ptr"]])):
            x = torch.empty(1, 256, size, size, device="cuda", dtype=torch.bfloat16)
            launches, called = traced_launches(forward, x, *parts)
            assert launches == written and called <= ALLOCATION, (size, launches, called)
        parts = torch.empty(1, 96, 32, dtype=torch.int16, device="cuda"), torch.empty(96, 1, device="cuda")
        launches, called = traced_launches(alone, torch.empty(2, 96, 9, 9, device="cuda"), *parts)
        assert launches == [["y_ptr"]] and called <= ALLOCATION


def test_traced_for_a_gpu_8_bit_images_stay_8_bit(monkeypatch):
    pretend_sm_90(monkeypatch)
    like = weight(96, 2304, device="cpu")

    def forward(x, residual, scale, codes, w_scale, sums):
        w, about = replace(like, codes=codes, scale=w_scale), {"kernel_size": 3, "padding": 1, "x_zero": scale}
        return qconv2d_int8(
            x, scale, w, code_sums=sums, residual=residual, residual_scale=scale, out_scale=scale, **about
        )

    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = torch.empty(18, 96, 32, dtype=torch.int16, device="cuda"), torch.empty(96, 1, device="cuda")
        sums, scale = torch.empty(96, 1, dtype=torch.int32, device="cuda"), torch.empty(1, device="cuda")
        x, residual = (torch.empty(1, c, 100, 100, dtype=torch.int8, device="cuda") for c in (256, 96))
        launches, called = traced_launches(forward, x, residual, scale, *parts, sums)
    assert launches == [["y_ptr"]] and called <= ALLOCATION | {"expand", "_to_copy"}, called
