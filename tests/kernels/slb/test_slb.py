"""Facts about SLB beyond the reference: that it is right itself, limits and ties, optimizer steps, packing, errors."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from gs_kernels import (
    PackedWeight,
    dequantize_packed,
    pack_codes,
    slb_adamw_,
    slb_codes,
    slb_pack,
    slb_sgd_,
    slb_weight,
    unpack_codes,
)
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.slb.ref import slb_adamw_ref, slb_weight_backward_ref, slb_weight_ref
from tests.helpers import relative_rms, same_bits

NAN, INF = float("nan"), float("inf")


def grid(levels, device, tau=1.0):
    return torch.linspace(-1, 1, levels, device=device), torch.full((1,), tau, device=device)


def column(values, device):
    """Logits of one weight, `[1, L, 1]`."""
    return torch.tensor(values, device=device).view(1, -1, 1)


def random(*size, device, generator):
    return torch.randn(size, generator=generator, device=device)


@pytest.mark.parametrize("planes, hard", [(1, False), (2, False), (5, False), (5, True)])
def test_the_gradients_of_the_reference_are_those_of_finite_differences(planes, hard):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, planes, 2, 2, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    levels, tau = (t.double() for t in grid(max(2, planes), "cpu", 0.6))

    def weight(logits, scale):
        return slb_weight_ref(logits, levels, tau, scale, hard=hard)

    assert gradcheck(weight, (logits.requires_grad_(), scale.requires_grad_()))
    dw = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad(weight(logits, scale), (logits, scale), dw, materialize_grads=True)
    got = slb_weight_backward_ref(dw, logits.detach(), levels, tau, scale.detach(), hard=hard)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(got, want, strict=True))


def test_weight_and_gradient_of_two_levels_are_those_of_the_formula(device):
    """P = 1/4 and 3/4, so W = 1/2, times 2; dA = dW * scale * P * (v - W) / tau = ±10 * 2 * 3/8 / 0.5."""
    logits = column([0.0, 0.5 * math.log(3.0)], device).requires_grad_()
    scale = torch.full((1,), 2.0, device=device, requires_grad=True)
    w = slb_weight(logits, *grid(2, device, tau=0.5), scale)
    assert w.item() == pytest.approx(1.0, rel=1e-6)
    w.backward(torch.full_like(w, 10.0))
    assert logits.grad.flatten().tolist() == pytest.approx([-15.0, 15.0], rel=1e-6)
    assert scale.grad.tolist() == pytest.approx([5.0], rel=1e-6)


@pytest.mark.parametrize("levels", [2, 4, 16, 19])
def test_a_falling_temperature_ends_at_the_hard_choice(levels, device, generator):
    logits = random(5, levels, 33, device=device, generator=generator)
    hard = slb_weight(logits, *grid(levels, device), hard=True)
    assert torch.equal(hard, slb_weight(logits, *grid(levels, device, 2.0**-100)))
    gaps = [(slb_weight(logits, *grid(levels, device, tau)) - hard).norm().item() for tau in (3.0, 1.0, 0.3, 0.01)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.2 * gaps[0]


def test_ties_mix_to_their_mean_and_choose_the_lowest_level(device):
    levels = torch.tensor([-4.0, 1.0, 2.0, 9.0], device=device)
    logits = column([0.0, 7.0, 7.0, -1.0], device)
    cold = torch.full((1,), 2.0**-100, device=device)
    assert slb_weight(logits, levels, cold).item() == 1.5
    assert slb_weight(logits, levels, cold, hard=True).item() == 1.0
    assert slb_codes(logits).item() == 1
    everywhere = torch.zeros(3, 19, 40, device=device)
    assert slb_codes(everywhere).max() == 0


def test_the_gradient_at_a_tiny_temperature_is_finite_and_zero_without_ties(device, generator):
    logits = random(2, 4, 9, device=device, generator=generator).requires_grad_()
    slb_weight(logits, *grid(4, device, 2.0**-100)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_one_plane_is_the_difference_of_two(device, generator):
    levels, tau = torch.tensor([-1.0, 0.5], device=device), torch.full((1,), 0.3, device=device)
    one = random(4, 1, 5, 5, device=device, generator=generator).requires_grad_()
    two = torch.cat([torch.zeros_like(one), one], 1).detach().requires_grad_()
    dw = random(4, 5, 5, device=device, generator=generator)
    a, b = slb_weight(one, levels, tau), slb_weight(two, levels, tau)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    (da,), (db,) = torch.autograd.grad(a, one, dw), torch.autograd.grad(b, two, dw)
    assert relative_rms(da, db[:, 1:]) < 1e-5
    assert torch.equal(slb_codes(one.detach()), (one.detach() > 0).squeeze(1).to(torch.uint8))


def test_large_logits_do_not_overflow(device):
    logits = torch.tensor([[3e38, -3e38, 0.0], [-INF, 1.0, 1.0], [-INF, -INF, -3e38]], device=device).view(3, 3, 1)
    assert slb_weight(logits, *grid(3, device)).flatten().tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("levels", [2, 19])
def test_nan_makes_the_weight_nan_and_counts_as_infinity_for_codes(levels, device):
    logits = torch.zeros(1, levels, 3, device=device)
    logits[0, 1, 1], logits[0, -1, 2] = NAN, NAN
    for hard in (False, True):
        assert slb_weight(logits, *grid(levels, device), hard=hard).isnan().tolist() == [[False, True, True]]
    assert slb_codes(logits).tolist() == [[0, 1, levels - 1]]
    logits[0, 0, 1] = INF
    assert slb_codes(logits).tolist() == [[0, 0, levels - 1]]


def test_a_hard_choice_leaves_the_logits_without_a_gradient(device, generator):
    logits = random(3, 4, 6, device=device, generator=generator).requires_grad_()
    scale = torch.ones(3, device=device, requires_grad=True)
    levels, tau = grid(4, device)
    w = slb_weight(logits, levels, tau, scale, hard=True)
    w.sum().backward()
    assert logits.grad is None
    torch.testing.assert_close(scale.grad, levels[slb_codes(logits).long()].sum(1))


@pytest.mark.parametrize("planes, bits", [(1, 1), (2, 1), (3, 2), (4, 2), (16, 4), (17, 8), (3, 4)])
def test_packed_codes_are_the_canonical_bytes_of_the_codes(planes, bits, device, generator):
    logits = random(3, planes, 7, 5, device=device, generator=generator)
    packed = slb_pack(logits) if (planes, bits) != (3, 4) else slb_pack(logits, bits=4)
    codes = slb_codes(logits)
    assert codes.shape == (3, 7, 5) and codes.dtype == torch.uint8
    assert torch.equal(packed, pack_codes(codes.view(3, 35), bits))
    assert torch.equal(unpack_codes(packed, bits, (3, 35)).view(3, 7, 5), codes)


def test_packed_codes_stand_for_the_hard_weight(device, generator):
    logits = random(6, 4, 40, device=device, generator=generator)
    levels, tau = grid(4, device)
    scale = torch.rand(6, generator=generator, device=device)
    packed = PackedWeight(slb_pack(logits), scale.view(-1, 1), 0.0, levels, 2, (6, 40), 40)
    assert torch.equal(dequantize_packed(packed), slb_weight(logits, levels, tau, scale, hard=True))


def test_flat_logits_make_a_convolution_weight_in_any_memory_format(device, generator):
    logits = random(4, 2, 3 * 2 * 5, device=device, generator=generator).requires_grad_()
    plain = slb_weight(logits, *grid(2, device), shape=(4, 3, 2, 5))
    last = slb_weight(logits, *grid(2, device), shape=(4, 3, 2, 5), memory_format=torch.channels_last)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last) and torch.equal(plain.flatten(1), slb_weight(logits, *grid(2, device)))
    dw = random(4, 3, 2, 5, device=device, generator=generator)
    grads = [
        torch.autograd.grad(plain, logits, g, retain_graph=True)[0]
        for g in (dw, dw.to(memory_format=torch.channels_last), dw.transpose(1, 3).contiguous().transpose(1, 3))
    ]
    assert same_bits(grads[0], grads[1]) and same_bits(grads[0], grads[2])
    video = slb_weight(logits, *grid(2, device), shape=(4, 3, 1, 2, 5), memory_format=torch.channels_last_3d)
    assert video.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(video.flatten(1), plain.flatten(1))


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: its bf16 casts truncate")
def test_the_weight_is_cast_once_to_the_dtype_asked_for(device, generator):
    logits = random(4, 4, 50, device=device, generator=generator).requires_grad_()
    w = slb_weight(logits, *grid(4, device), dtype=torch.bfloat16)
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w, slb_weight(logits, *grid(4, device)).bfloat16(), rtol=8e-3, atol=0)
    w.sum().backward()
    assert logits.grad.dtype == torch.float32


def test_backward_keeps_the_logits_and_next_to_nothing_else(device, generator):
    logits = random(16, 4, 512, device=device, generator=generator).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        slb_weight(logits, *grid(4, device), torch.ones(16, device=device))
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert others.pop(logits.untyped_storage().data_ptr()) == logits.nbytes
    assert sum(others.values()) <= 4 * (4 + 1 + 16)


def test_a_second_derivative_is_refused(device):
    logits = torch.zeros(1, 2, 3, device=device, requires_grad=True)
    w = slb_weight(logits, *grid(2, device))
    (da,) = torch.autograd.grad((w * w).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of its own; call backward without create_graph"):
        da.sum().backward()


def test_a_temperature_out_of_range_off_the_cpu_makes_every_weight_nan(device):
    """Where looking at the value would stall a GPU or stop a trace: the raw op does not look."""
    logits = torch.zeros(2, 3, 4, device=device)
    levels = torch.linspace(-1, 1, 3, device=device)
    for tau in (0.0, -1.0, INF, NAN, 2.0**-101):
        args = logits, levels, torch.full((1,), tau, device=device), None, [2, 4]
        assert torch.ops.gs_kernels.slb_weight(*args, False, False, torch.float32, "").isnan().all()
        assert torch.ops.gs_kernels.slb_weight(*args, True, False, torch.float32, "").eq(-1).all()


# -- optimizer steps


def reference_step(optimizer, logits, dw, levels, tau, scale):
    logits.grad = slb_weight_backward_ref(dw, logits.detach(), levels, tau, scale)[0]
    optimizer.step()


@pytest.mark.parametrize("planes, decay, scaled", [(1, 0.0, True), (4, 0.1, True), (19, 0.01, False)])
def test_adamw_is_that_of_torch(planes, decay, scaled, device, generator):
    levels, tau = grid(max(2, planes), device, 0.8)
    logits = random(5, planes, 6, 3, 3, device=device, generator=generator)
    scale = torch.rand(5, generator=generator, device=device) + 0.5 if scaled else None
    theirs = logits.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.02, betas=(0.8, 0.99), weight_decay=decay)
    avg, sq, step = torch.zeros_like(logits), torch.zeros_like(logits), torch.zeros(1, device=device)
    for t in range(4):
        dw = random(5, 6, 3, 3, device=device, generator=generator)
        reference_step(optimizer, theirs, dw, levels, tau, scale)
        step += 1
        lr = 0.02 if t % 2 else torch.full((1,), 0.02, device=device)
        slb_adamw_(logits, dw, levels, tau, avg, sq, step, scale, lr=lr, betas=(0.8, 0.99), weight_decay=decay)
    state = optimizer.state[theirs]
    assert relative_rms(logits, theirs.detach()) < 1e-6
    assert relative_rms(avg, state["exp_avg"]) < 1e-6 and relative_rms(sq, state["exp_avg_sq"]) < 1e-6


@pytest.mark.parametrize("planes, momentum, nesterov", [(2, 0.0, False), (4, 0.9, False), (4, 0.9, True)])
def test_sgd_is_that_of_torch(planes, momentum, nesterov, device, generator):
    levels, tau = grid(planes, device, 0.8)
    logits = random(5, planes, 54, device=device, generator=generator)
    theirs = logits.clone().requires_grad_()
    kwargs = {"lr": 0.5, "momentum": momentum, "weight_decay": 0.05, "nesterov": nesterov}
    optimizer = torch.optim.SGD([theirs], **kwargs)
    buffer = torch.zeros_like(logits) if momentum else None
    for _ in range(4):
        dw = random(5, 54, device=device, generator=generator)
        reference_step(optimizer, theirs, dw, levels, tau, None)
        slb_sgd_(logits, dw, levels, tau, buffer, **kwargs)
    assert relative_rms(logits, theirs.detach()) < 1e-6
    if buffer is not None:
        assert relative_rms(buffer, optimizer.state[theirs]["momentum_buffer"]) < 1e-6


@pytest.mark.parametrize("beta, step", [(0.999, 1.0), (0.999, 20.0), (0.9, 3.0), (0.0, 1.0), (0.999, 1e6)])
def test_the_bias_correction_does_not_cancel(beta, step, device, generator):
    """1 - 0.999 ** 1 loses five digits in fp32."""
    logits, dw = torch.zeros(1, 2, 64, device=device), random(1, 64, device=device, generator=generator)
    avg, sq = (random(1, 2, 64, device=device, generator=generator).square() for _ in range(2))
    args = dw, *grid(2, device), avg, sq, torch.full((1,), step, device=device)
    want, _, _ = slb_adamw_ref(*(t.double() for t in (logits, *args)), lr=0.1, betas=(beta, beta), weight_decay=0.0)
    slb_adamw_(logits, *args, lr=0.1, betas=(beta, beta), weight_decay=0.0)
    torch.testing.assert_close(logits, want.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [(3, 4, 18), (64, 4, 512)], ids=["small", "large"])
def test_what_is_frozen_changes_in_no_bit(size, device, generator):
    logits, avg, sq = (random(*size, device=device, generator=generator) for _ in range(3))
    dw, (levels, tau) = random(size[0], size[2], device=device, generator=generator), grid(4, device)
    before = [t.clone() for t in (logits, avg, sq)]
    frozen = torch.ones(1, dtype=torch.bool, device=device)
    one = torch.ones(1, device=device)
    slb_adamw_(logits, dw, levels, tau, avg, sq.abs_(), one, lr=0.1, weight_decay=0.5, frozen=frozen)
    slb_sgd_(logits, dw, levels, tau, avg, lr=0.1, momentum=0.9, weight_decay=0.5, frozen=frozen)
    assert all(same_bits(a, b) for a, b in zip((logits, avg, sq), (*before[:2], before[2].abs()), strict=True))
    slb_sgd_(logits, dw, levels, tau, avg, lr=0.1, momentum=0.9, frozen=~frozen)
    assert not torch.equal(logits, before[0]) and not torch.equal(avg, before[1])


def test_an_update_before_backward_is_noticed(device):
    logits = torch.zeros(1, 2, 3, device=device, requires_grad=True)
    w = slb_weight(logits, *grid(2, device))
    slb_sgd_(logits, torch.ones(1, 3, device=device), *grid(2, device), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


def test_training_by_steps_finds_the_nearest_levels(device, generator):
    """W learns a target by dW alone, and a falling temperature makes it one of the levels."""
    target = torch.tensor([[-0.9, -0.4, 0.3, 0.95]], device=device)
    levels, tau = grid(4, device)
    logits = random(1, 4, 4, device=device, generator=generator).mul_(0.01)
    avg, sq, step = torch.zeros_like(logits), torch.zeros_like(logits), torch.zeros(1, device=device)
    for _ in range(60):
        dw = slb_weight(logits, levels, tau) - target
        slb_adamw_(logits, dw, levels, tau, avg, sq, step.add_(1), lr=0.1, weight_decay=0.0)
        tau *= 0.95
    assert slb_codes(logits).tolist() == [[0, 1, 2, 3]]


# -- errors

LOGITS, LEVELS, TAU = torch.zeros(2, 4, 6), torch.linspace(-1, 1, 4), torch.ones(1)
WRONG_VALUES = {
    "two axes": ((torch.zeros(2, 4), LEVELS, TAU), {}, r"logits must be \[O, L, ...\] .* got \[2, 4\]"),
    "no weight": ((torch.zeros(2, 4, 0), LEVELS, TAU), {}, r"no axis of 0, got \[2, 4, 0\]"),
    "too many levels": ((torch.zeros(1, 257, 2), LEVELS, TAU), {}, "at most 256 levels along axis 1, got 257"),
    "other levels": (
        (LOGITS, LEVELS[:3], TAU),
        {},
        r"slb_weight: levels must have shape \[4\] for logits \[2, 4, 6\], got \[3\]",
    ),
    "one plane, one level": ((torch.zeros(2, 1, 6), LEVELS[:1], TAU), {}, r"levels must have shape \[2\]"),
    "temperature a scalar": ((LOGITS, LEVELS, TAU[0]), {}, r"temperature must have shape \[1\] .* got \[\]"),
    "temperature 0": ((LOGITS, LEVELS, TAU * 0), {}, "temperature must be > 0 .* and finite, got 0"),
    "temperature negative": ((LOGITS, LEVELS, -TAU), {}, "temperature must be > 0"),
    "temperature NaN": ((LOGITS, LEVELS, TAU * NAN), {}, "temperature must be > 0 .* got nan"),
    "level NaN": ((LOGITS, LEVELS * NAN, TAU), {}, "every level must be finite, got"),
    "scale of another shape": ((LOGITS, LEVELS, TAU, torch.ones(3)), {}, r"scale must have shape \[2\]"),
    "other device": (
        (LOGITS, LEVELS.to("meta"), TAU),
        {},
        r"levels must be on the device of the logits, cpu, got meta; use levels.to",
    ),
    "other rows": (
        (LOGITS, LEVELS, TAU),
        {"shape": (3, 4)},
        r"shape must be \[2, ...\] with 6 weights .* got \[3, 4\]",
    ),
    "other columns": ((LOGITS, LEVELS, TAU), {"shape": (2, 2, 2)}, r"with 6 weights for each .* got \[2, 2, 2\]"),
    "channels last of two axes": (
        (LOGITS, LEVELS, TAU),
        {"memory_format": torch.channels_last},
        "memory_format must be torch.contiguous_format.* got torch.channels_last for 2 axes",
    ),
}
WRONG_TYPES = {
    "a list": (([0.0], LEVELS, TAU), {}, "logits must be a tensor, got list"),
    "integer logits": ((LOGITS.int(), LEVELS, TAU), {}, "must be one of float32, float16, bfloat16, got int32; cast"),
    "double levels": ((LOGITS, LEVELS.double(), TAU), {}, r"levels must be float32, got float64; use levels.float\(\)"),
    "temperature a number": ((LOGITS, LEVELS, 1.0), {}, r"temperature must be a tensor, got float; use torch.tensor"),
    "integer weight": ((LOGITS, LEVELS, TAU), {"dtype": torch.int8}, "dtype must be one of float32, .* got int8"),
}
DW, STATE, STEP = torch.zeros(2, 6), torch.zeros(2, 4, 6), torch.ones(1)
WRONG_UPDATES = {
    "strided logits": ((torch.zeros(2, 6, 4).mT, DW), {}, "logits must be contiguous, got strides"),
    "gradient of the logits": ((LOGITS, LOGITS), {}, r"dw must be the gradient of the weight, .* got \[2, 4, 6\]"),
    "integer dw": ((LOGITS, DW.int()), {}, "dw must be one of float32, .* got int32"),
    "other state": (
        (LOGITS, DW),
        {"momentum_buffer": DW},
        r"momentum_buffer must have shape \[2, 4, 6\], got \[2, 6\]",
    ),
    "strided state": ((LOGITS, DW), {"momentum_buffer": torch.zeros(2, 6, 4).mT}, "momentum_buffer must be contiguous"),
    "no state": ((LOGITS, DW), {"momentum_buffer": None}, "must be a tensor exactly if momentum > 0, got None"),
    "state without momentum": ((LOGITS, DW), {"momentum": 0.0}, "exactly if momentum > 0, got a tensor for momentum=0"),
    "negative lr": ((LOGITS, DW), {"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
    "momentum 1": ((LOGITS, DW), {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    "lr of two": ((LOGITS, DW), {"lr": torch.ones(2)}, r"lr must have shape \[1\]"),
    "nesterov alone": (
        (LOGITS, DW),
        {"momentum": 0.0, "momentum_buffer": None, "nesterov": True},
        "nesterov must come with momentum > 0",
    ),
    "frozen a number": ((LOGITS, DW), {"frozen": torch.ones(1)}, "frozen must be bool, got float32"),
    "temperature 0": ((LOGITS, DW), {"temperature": TAU * 0}, "slb_sgd_: temperature must be > 0"),
}


@pytest.mark.parametrize("args, kwargs, words", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_named(args, kwargs, words):
    with pytest.raises(ValueError, match=words):
        slb_weight(*args, **kwargs)


@pytest.mark.parametrize("args, kwargs, words", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types_are_named(args, kwargs, words):
    with pytest.raises(TypeError, match=words):
        slb_weight(*args, **kwargs)


@pytest.mark.parametrize("args, kwargs, words", WRONG_UPDATES.values(), ids=WRONG_UPDATES)
def test_wrong_updates_are_named(args, kwargs, words):
    logits, dw = args
    given = {"temperature": TAU, "momentum_buffer": STATE.clone(), "lr": 0.1, "momentum": 0.9} | kwargs
    with pytest.raises((ValueError, TypeError), match=words):
        slb_sgd_(logits, dw, LEVELS, **given)


@pytest.mark.parametrize(
    "kwargs, words", [({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\), got 1.0"), ({"eps": NAN}, "eps must be in")]
)
def test_wrong_adamw_numbers_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        slb_adamw_(LOGITS.clone(), DW, LEVELS, TAU, STATE.clone(), STATE.clone(), STEP, lr=0.1, **kwargs)


@pytest.mark.parametrize("planes, bits, use", [(16, 2, 4), (17, 4, 8), (2, 3, 1), (3, 1, 2)])
def test_bits_that_do_not_hold_the_levels_are_refused(planes, bits, use):
    with pytest.raises(ValueError, match=f"hold {planes} levels, got bits={bits}; use bits={use}"):
        slb_pack(torch.zeros(1, planes, 4), bits=bits)


def test_more_levels_than_a_byte_holds_are_refused():
    with pytest.raises(ValueError, match="slb_codes: logits must have at most 256 levels along axis 1, got 300"):
        slb_codes(torch.zeros(1, 300, 2))
