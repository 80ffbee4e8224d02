"""Facts about ranges and grids beyond the reference: exact zeros, empty ranges, NaN, launches, gradients."""

import importlib

import pytest
import torch

from gs_kernels import (
    IntFormat,
    PerChannel,
    PerGroup,
    choose_qparams,
    dynamic_fake_quant,
    fake_quant,
    minmax,
    observe_fake_quant,
)
from gs_kernels.observe.ref import choose_qparams_ref
from tests.helpers import same_bits

NAN, INF = float("nan"), float("inf")


def ranges(device, low, high):
    return torch.tensor(low, device=device), torch.tensor(high, device=device)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("narrow", [False, True])
def test_a_symmetric_signed_grid_has_zero_point_0(bits, narrow, device, generator):
    """Whatever the last bits of scale are: computed by rounding, the zero point is -1 for some ranges."""
    grid = IntFormat(bits, signed=True, narrow=narrow)
    high = torch.rand(20000, generator=generator, device=device) * 10
    _, zero = choose_qparams(-high, high, qmin=grid.qmin, qmax=grid.qmax, symmetric=True)
    assert (zero == 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_a_symmetric_grid_of_two_levels_is_plus_and_minus_half_a_scale(signed, device):
    grid = IntFormat(1, signed=signed)
    scale, zero = choose_qparams(*ranges(device, [-3.0], [1.0]), qmin=grid.qmin, qmax=grid.qmax, symmetric=True)
    x = torch.tensor([-3.0, -0.5, 0.5, 9.0], device=device)
    y = fake_quant(x, scale, zero, qmin=grid.qmin, qmax=grid.qmax)
    assert scale.tolist() == [6.0] and y.tolist() == [-3.0, -3.0, 3.0, 3.0]


@pytest.mark.parametrize("bits, middle", [(8, 128.0), (4, 8.0), (2, 2.0), (1, 0.5)])
def test_a_symmetric_unsigned_grid_has_0_in_its_upper_middle(bits, middle, device):
    scale, zero = choose_qparams(*ranges(device, [-3.0], [1.0]), qmin=0, qmax=2**bits - 1, symmetric=True)
    assert (scale.item(), zero.item()) == (pytest.approx(6.0 / (2**bits - 1)), middle)


def test_a_grid_always_holds_0_exactly(device):
    scale, zero = choose_qparams(
        *ranges(device, [2.0, -5.0, -1.0], [6.0, -1.0, 3.0]), qmin=0, qmax=255, symmetric=False
    )
    assert zero.tolist() == [0.0, 255.0, 64.0]
    zeros = torch.zeros(3, 2, device=device)
    assert (fake_quant(zeros, scale, zero, qmin=0, qmax=255, granularity=PerChannel(0)) == 0).all()


def test_an_affine_grid_reaches_both_ends_of_its_range(device):
    low, high = ranges(device, [-0.4], [1.7])
    scale, zero = choose_qparams(low, high, qmin=-128, qmax=127, symmetric=False)
    y = fake_quant(torch.cat([low, high]), scale, zero, qmin=-128, qmax=127)
    assert (y - torch.cat([low, high])).abs().max() <= scale.item() / 2


def test_a_range_of_nothing_has_scale_1_and_a_tiny_one_a_floor(device):
    scale, _ = choose_qparams(*ranges(device, [0.0, -1e-38], [0.0, 1e-38]), qmin=-8, qmax=7, symmetric=True)
    assert scale.tolist() == [1.0, 2.0**-100]


@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_and_infinity_in_a_range_reach_the_scale(symmetric, device):
    low, high = ranges(device, [NAN, -INF, 0.0], [NAN, 1.0, INF])
    scale, _ = choose_qparams(low, high, qmin=-8, qmax=7, symmetric=symmetric)
    assert scale[0].isnan() and scale[1:].tolist() == [INF, INF]


def test_qparams_refuse_what_is_no_range():
    with pytest.raises(ValueError, match=r"must have one shape, \[C\], got \[2\] and \[3\]"):
        choose_qparams(torch.zeros(2), torch.zeros(3), qmin=-8, qmax=7, symmetric=True)
    with pytest.raises(TypeError, match=r"x_min must be a float32 tensor, got torch.float16"):
        choose_qparams(torch.zeros(2).half(), torch.zeros(2), qmin=-8, qmax=7, symmetric=True)
    with pytest.raises(ValueError, match="qmin must be below qmax"):
        choose_qparams(torch.zeros(2), torch.zeros(2), qmin=7, qmax=-8, symmetric=True)


@pytest.mark.parametrize("op", [minmax, lambda x: dynamic_fake_quant(x, qmin=-8, qmax=7, symmetric=True)])
def test_observers_refuse_tensors_without_elements(op):
    with pytest.raises(ValueError, match=r"x must hold at least one element, got shape \(3, 0\)"):
        op(torch.ones(3, 0))


@pytest.mark.parametrize("granularity, dims", [(PerChannel(0), (1,)), (PerChannel(1), (0,)), (PerGroup(43), (1,))])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_range_of_one_sign_stays_away_from_0(granularity, dims, sign, device, generator):
    """A tile's lanes outside the tensor hold 0, which a range must not take for a value."""
    x = sign * (torch.rand(17, 129, generator=generator, device=device) + 1)
    rows = x.view(-1, 43) if isinstance(granularity, PerGroup) else x
    low, high = minmax(x, granularity=granularity)
    assert torch.equal(low, rows.amin(dims)) and torch.equal(high, rows.amax(dims))
    _, low, high = observe_fake_quant(x, torch.ones(1, device=device), torch.zeros(1, device=device), qmin=-8, qmax=7)
    assert (low, high) == (x.min(), x.max())


@pytest.mark.parametrize(
    "grid, levels",
    [
        (IntFormat(8), (-128, 127)),
        (IntFormat(8, narrow=True), (-127, 127)),
        (IntFormat(2, narrow=True), (-1, 1)),
        (IntFormat(4, signed=False), (0, 15)),
        (IntFormat(4, signed=False, narrow=True), (1, 15)),
        (IntFormat(1), (-1, 0)),
        (IntFormat(1, signed=False), (0, 1)),
    ],
)
def test_the_levels_of_a_grid(grid, levels):
    assert (grid.qmin, grid.qmax) == levels


def test_nan_spoils_the_range_of_its_channel_only(device):
    x = torch.tensor([[1.0, NAN], [INF, -4.0]], device=device)
    for axis, channel in ((0, 1), (1, 0)):
        low, high = minmax(x, granularity=PerChannel(axis))
        assert low.isnan().tolist() == high.isnan().tolist() == [channel == 1, channel == 0]
        assert (low[channel].item(), high[channel].item()) == ((-4.0, INF) if axis == 0 else (1.0, INF))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerChannel(1), PerGroup(20)])
def test_one_pass_gives_the_bits_of_three(symmetric, granularity, device, generator):
    x = torch.randn(6, 40, generator=generator, device=device)
    low, high = minmax(x, granularity=granularity)
    scale, zero = choose_qparams_ref(low, high, qmin=-8, qmax=7, symmetric=symmetric)
    y = fake_quant(x, scale, zero, qmin=-8, qmax=7, granularity=granularity)
    got = dynamic_fake_quant(x, qmin=-8, qmax=7, symmetric=symmetric, granularity=granularity)
    assert all(torch.equal(a, b) for a, b in zip(got, (y, scale, zero), strict=True))


def test_dynamic_scales_are_constants_for_autograd(device):
    x = torch.tensor([[-8.0, 2.0, 7.0]], device=device, requires_grad=True)
    y, scale, zero = dynamic_fake_quant(x, qmin=-8, qmax=7, symmetric=False, granularity=PerChannel(0))
    assert not scale.requires_grad and not zero.requires_grad
    y.sum().backward()
    assert scale.tolist() == [1.0] and x.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_a_channel_with_nan_does_not_spoil_the_others(device):
    x = torch.tensor([[1.0, NAN], [1.0, -1.0]], device=device)
    y, _, _ = dynamic_fake_quant(x, qmin=-1, qmax=1, symmetric=True, granularity=PerChannel(0))
    assert y[0].isnan().all() and y[1].tolist() == [1.0, -1.0]


def test_observing_changes_nothing_and_sees_everything(device, generator):
    x = torch.randn(3, 50, generator=generator, device=device).requires_grad_()
    scale, zero = torch.tensor([0.1], device=device).requires_grad_(), torch.tensor([3.0], device=device)
    y, low, high = observe_fake_quant(x, scale, zero, qmin=0, qmax=15)
    alone = fake_quant(x, scale, zero, qmin=0, qmax=15)
    assert same_bits(y, alone) and not low.requires_grad and not high.requires_grad
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())
    dy = torch.randn(y.shape, generator=generator, device=device)
    both = (torch.autograd.grad(out, (x, scale), dy) for out in (y, alone))
    assert all(same_bits(a, b) for a, b in zip(*both, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that launchers launch; nothing runs, so meta tensors will do."""
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")
    names = []
    for folder in ("fake_quant", "observe"):
        module = importlib.import_module(f"gs_kernels.{folder}.kernel")
        monkeypatch.setattr(module, "launch", lambda kernel, *_args, **_flags: names.append(kernel.__name__))
    return names


@pytest.mark.parametrize("columns, axis, count", [(16384, 0, 1), (128, 0, 1), (16385, 0, 3), (64, 1, 3)])
def test_a_row_that_fits_a_program_takes_one_launch(columns, axis, count, launches):
    from gs_kernels.observe.kernel import dynamic_fake_quant_triton

    dynamic_fake_quant_triton(torch.empty(8, columns, device="meta"), -8, 7, True, axis, 0)
    assert len(launches) == count


def test_observing_takes_one_launch(launches):
    from gs_kernels.observe.kernel import observe_fake_quant_triton

    one = torch.empty(1, device="meta")
    observe_fake_quant_triton(torch.empty(8, 9999, device="meta"), one, one, 0, 255)
    assert launches == ["_fake_quant_fwd_kernel"]
