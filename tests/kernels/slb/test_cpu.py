"""SLB on a CPU, in C++ and without a compiler for it, against the reference."""

import pytest
import torch

from gs_kernels import slb_adamw_, slb_pack, slb_sgd_, slb_weight
from gs_kernels.cpu import library as native
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.slb import cpu
from gs_kernels.slb.ref import slb_adamw_ref, slb_pack_ref, slb_sgd_ref, slb_weight_backward_ref, slb_weight_ref
from tests.helpers import relative_rms, same_bits

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")

NAN, INF = float("nan"), float("inf")


def grid(levels, tau=1.0):
    return torch.linspace(-1, 1, levels), torch.full((1,), tau)


@pytest.fixture(params=["cpp", "reference"])
def library(request, monkeypatch):
    """What CPUs run with a C++ compiler, and without."""
    if request.param == "reference":
        monkeypatch.setattr(cpu, "kernels", lambda: None)
    elif cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")


def test_weights_are_right_to_the_last_bits_down_to_where_they_vanish(library):
    """W of levels 0 and 1 is 1 / (1 + exp(-a)): as a falls, nothing but the exponential."""
    a = torch.cat([torch.linspace(-87, 20, 100001), torch.tensor([-1e4, -3e38, -INF, 3e38])])
    for logits in (a, torch.stack([torch.zeros_like(a), a])):
        w = slb_weight(logits.view(1, -1, len(a)), torch.tensor([0.0, 1.0]), torch.ones(1)).flatten()
        want = a[:-4].double().sigmoid()
        assert (((w[:-4].double() - want) / want).abs() < 4e-7 + a[:-4].abs() * 2**-23).all()  # of the exponent in fp32
        assert w[-4:].tolist() == [0.0, 0.0, 0.0, 1.0]
    for planes, value in ((1, NAN), (1, INF), (2, INF)):  # infinity less itself, as softmax has it
        assert slb_weight(torch.full((1, planes, 40), value), torch.tensor([0.0, 1.0]), torch.ones(1)).isnan().all()


def test_exponentials_are_right_to_the_last_bits():
    """Far below 0 the weight of levels 0 and 1 is the exponential itself, here to the base of 2."""
    if cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")
    tau = torch.tensor([1.4426950408889634])
    assert (1 / tau.double()).float() * 1.4426950408889634 == 1.0  # so the exponent is the logit, exactly
    a = torch.cat([torch.linspace(-126, -25, 100001), torch.tensor([-25.5, -25.499998, -26.5, -27.5])])
    w = slb_weight(a.view(1, 1, -1), torch.tensor([0.0, 1.0]), tau).flatten().double()
    want = a.double().exp2()
    assert ((w - want) / want).abs().max() < 1.5e-7
    edges = slb_weight(torch.tensor([-126.6, -3e38, -INF]).view(1, 1, 3), torch.tensor([0.0, 1.0]), tau)
    assert edges.flatten().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rest", [(3, 2, 2), (129,), (40, 3, 3)], ids=["12", "129", "360"])
@pytest.mark.parametrize("planes", [1, 2, 4, 5, 9, 16, 19])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_agrees_with_the_reference(rest, planes, hard, dtype, library):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, planes, *rest, generator=generator).to(dtype)
    levels, tau = grid(max(2, planes), 0.4)
    scale, dw = torch.rand(7, generator=generator), torch.randn(7, *rest, generator=generator).to(dtype)
    layout = torch.channels_last if len(rest) == 3 else torch.contiguous_format
    w = slb_weight(logits, levels, tau, scale, hard=hard, memory_format=layout)
    want = slb_weight_ref(logits, levels, tau, scale, hard=hard, memory_format=layout)
    low = dtype != torch.float32
    torch.testing.assert_close(w, want, rtol=8e-3 if low else 1e-5, atol=1e-6)
    assert w.stride() == want.stride()
    dw = dw.to(memory_format=layout)
    wanted = slb_weight_backward_ref(dw, logits, levels, tau, scale, hard=hard)
    for asked in ((True, True), (True, False), (False, True)):
        got = cpu.slb_weight_backward_cpu(dw, logits, levels, tau, scale, hard, *asked)
        for grad, right, is_asked in zip(got, wanted, asked, strict=True):
            assert relative_rms(grad, right) < (8e-3 if low else 1e-5) if is_asked else grad.numel() == 0
    assert torch.equal(slb_pack(logits, bits=8), slb_pack_ref(logits, bits=8))


@pytest.mark.parametrize("planes", [1, 2, 4, 5, 9, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [(1, 40), (5, 31), (9, 133), (130, 257)], ids=str)
def test_steps_of_the_cpu_agree_with_the_reference(planes, dtype, scaled, size, library):
    generator, (rows, columns) = torch.Generator().manual_seed(0), size
    logits, buffer = (torch.randn(rows, planes, columns, generator=generator).to(dtype) for _ in range(2))
    avg, sq = torch.randn(logits.shape, generator=generator), torch.rand(logits.shape, generator=generator)
    scale, dw = torch.rand(rows, generator=generator) if scaled else None, torch.randn(size, generator=generator)
    args = dw.to(dtype), *grid(max(2, planes), 0.4)
    near = 3e-3 if dtype != torch.float32 else 1e-6
    for decay, nesterov in ((0.0, False), (0.1, True)):
        got = [logits.clone(), avg.clone(), sq.clone()]
        want = slb_adamw_ref(logits, *args, avg, sq, torch.full((1,), 3.0), scale, lr=0.1, weight_decay=decay)
        slb_adamw_(got[0], *args, *got[1:], torch.full((1,), 3.0), scale, lr=0.1, weight_decay=decay)
        assert all(relative_rms(a, b) < near for a, b in zip(got, want, strict=True))
        got, how = [logits.clone(), buffer.clone()], {"lr": 0.1, "weight_decay": decay}
        want = slb_sgd_ref(logits, *args, buffer, scale, momentum=0.5, nesterov=nesterov, **how)
        slb_sgd_(got[0], *args, got[1], scale, momentum=0.5, nesterov=nesterov, **how)
        assert all(relative_rms(a, b) < near for a, b in zip(got, want, strict=True))
        plain = logits.clone()
        slb_sgd_(plain, *args, None, scale, **how)
        assert relative_rms(plain, slb_sgd_ref(logits, *args, None, scale, **how)[0]) < near


@pytest.mark.parametrize("step", [0.0, -3.0, NAN])
def test_a_step_that_was_not_counted_is_refused(step, library):
    logits = torch.zeros(2, 4, 6)
    args = torch.ones(2, 6), *grid(4), torch.zeros_like(logits), torch.zeros_like(logits)
    with pytest.raises(ValueError, match="step must be the number of this step, 1 for the first, got"):
        slb_adamw_(logits, *args, torch.full((1,), step), lr=0.1)
    assert not logits.any()
    slb_adamw_(logits, *args, torch.full((1,), step), lr=0.1, frozen=torch.ones(1, dtype=torch.bool))


def test_threads_change_no_bit(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, dw = torch.randn(9, 4, 300, generator=generator), torch.randn(9, 300, generator=generator)
    results = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(cpu, "PARALLEL_FROM", least)
        w = slb_weight(logits, *grid(4))
        results.append((w, *cpu.slb_weight_backward_cpu(dw, logits, *grid(4), None, False, True, True)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_code_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "_self_test", lambda functions: False)
    monkeypatch.setattr(native, "_problems", {})
    cpu.kernels.cache_clear()
    try:
        logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
        assert torch.equal(slb_weight(logits, *grid(4)), slb_weight_ref(logits, *grid(4)))
        assert "slb run as tensor operations" in caplog.text
    finally:
        cpu.kernels.cache_clear()
