"""Facts of the divergence beyond the reference: worked values, fp64, ruled-out classes, memory, errors, tracing."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gs_kernels import kl_divergence
from gs_kernels.kl_divergence import cpu, parts
from gs_kernels.kl_divergence.tiles import choose_tile
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.torch_private import tree_leaves
from tests.helpers import relative_rms
from tests.kernels.traces import pretend_sm_90, traced_launches

traced = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
OPS = torch.ops.gs_kernels


def draw(generator, device, *sizes, spread=3.0):
    return tuple(torch.randn(sizes, generator=generator, device=device) * spread for _ in range(2))


def exact(student, teacher, temperature):
    """The divergence and the gradient of its sum, in fp64."""
    s = student.detach().double().requires_grad_()
    p = (teacher.double() / temperature).softmax(-1)
    kl = (torch.special.xlogy(p, p) - p * (s / temperature).log_softmax(-1)).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), s)[0]


def test_two_classes_by_hand(device):
    student, teacher = torch.zeros(1, 2, device=device), torch.tensor([[0.0, 2 * math.log(3)]], device=device)
    want = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # (1/4, 3/4) from (1/2, 1/2)
    assert kl_divergence(student, teacher, temperature=2.0).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("v", [1, 2, 1000, 4099])
def test_value_and_gradient_are_those_of_fp64(v, temperature, generator, device):
    student, teacher = draw(generator, device, 5, v)
    want, wanted = exact(student, teacher, temperature)
    kl = kl_divergence(student.requires_grad_(), teacher, temperature=temperature)
    kl.sum().backward()
    torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=2e-6 / temperature)
    assert relative_rms(student.grad, wanted) < 2e-6 or v == 1


def test_rows_of_equal_logits_and_shifted_ones_diverge_by_nothing(generator, device):
    student, _ = draw(generator, device, 4, 300)
    student.requires_grad_()
    kl = kl_divergence(student, student.detach() + 5)
    kl.sum().backward()
    assert kl.abs().max() < 4e-6 and student.grad.abs().max() < 1e-6


def test_large_logits_do_not_overflow(generator, device):
    student, teacher = draw(generator, device, 3, 70, spread=3e4)
    kl = kl_divergence(student, teacher)
    torch.testing.assert_close(kl.double(), exact(student, teacher, 1.0)[0], rtol=1e-5, atol=1e-2)


def test_a_class_that_the_teacher_rules_out_adds_nothing(device):
    teacher = torch.tensor([[0.0, 1.0, -math.inf]], device=device)
    for last in (-math.inf, 2.0):
        student = torch.tensor([[1.0, 0.0, last]], device=device, requires_grad=True)
        kl = kl_divergence(student, teacher)
        kl.sum().backward()
        assert kl.isfinite().all() and student.grad.isfinite().all()
    assert kl_divergence(teacher.nan_to_num(neginf=1.0), teacher).isfinite().all()
    assert kl_divergence(teacher, teacher.nan_to_num(neginf=1.0)).isposinf().all()


def test_nan_makes_the_row_nan_and_no_other(device):
    for place in range(2):
        pair = [torch.ones(3, 5000, device=device) for _ in range(2)]
        pair[place][1, 4900] = math.nan
        kl = kl_divergence(*pair)
        assert kl[1].isnan() and kl[[0, 2]].isfinite().all()


def test_no_rows(device):
    x = torch.ones(0, 9, device=device, requires_grad=True)
    kl = kl_divergence(x, torch.ones(0, 9, device=device))
    assert kl.shape == (0,) and torch.autograd.grad(kl.sum(), x)[0].shape == (0, 9)


def test_each_has_its_own_dtype(generator, device):
    student, teacher = draw(generator, device, 4, 33)
    half = student.half().requires_grad_()
    kl = kl_divergence(half, teacher)
    torch.testing.assert_close(kl, kl_divergence(half.detach().float(), teacher))
    assert torch.autograd.grad(kl.sum(), half)[0].dtype == torch.float16


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")
def test_rows_in_parts_are_those_of_all(monkeypatch, generator):
    student, teacher = draw(generator, "cpu", 50, 7)
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    want = kl_divergence(student, teacher)
    monkeypatch.setattr(parts, "ELEMENTS", 100)
    torch.testing.assert_close(kl_divergence(student, teacher), want, rtol=1e-6, atol=1e-7)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an op makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t._is_view()]
        self.nbytes = max([self.nbytes, *(t.numel() * t.itemsize for t in made)])
        return out


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the interpreter's own tensors would count")
@pytest.mark.parametrize("compiled", [True, False])
def test_nothing_of_the_size_of_the_logits_is_made_but_the_gradient(compiled, monkeypatch, generator, device):
    if not compiled:
        monkeypatch.setattr(cpu, "kernels", lambda: None)
    student, teacher = (x.bfloat16() for x in draw(generator, device, 512, 1024))
    with Largest() as forward:
        kl = kl_divergence(student.requires_grad_(), teacher)
    with Largest() as backward:
        kl.sum().backward()
    assert forward.nbytes <= (4 * 512 if compiled else 4 * parts.ELEMENTS) < student.numel() * 2
    assert backward.nbytes == student.numel() * 2


X = torch.ones(2, 5)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (TypeError, "student must be float32 / float16 / bfloat16, got torch.float64", (X.double(), X, 1.0)),
        (TypeError, "teacher must be float32 / float16 / bfloat16, got torch.int64", (X, X.long(), 1.0)),
        (ValueError, r"student must be \[..., V\] with V >= 1, got \[2, 0\]", (X[:, :0], X[:, :0], 1.0)),
        (ValueError, r"teacher must be \[2, 5\] on cpu, as student is, got \[2, 4\]", (X, X[:, :4], 1.0)),
        (ValueError, r"teacher must be \[2, 5\] on cpu, .* on meta", (X, X.to("meta"), 1.0)),
        (ValueError, "temperature must be finite and > 0, got 0.0", (X, X, 0.0)),
        (
            ValueError,
            "teacher must need no gradient, got one that does; detach it",
            (X, X.clone().requires_grad_(), 1.0),
        ),
    ],
)
def test_wrong_arguments_are_refused(error, words, arguments):
    student, teacher, temperature = arguments
    with pytest.raises(error, match=words):
        kl_divergence(student, teacher, temperature=temperature)


def test_a_second_gradient_is_refused(device):
    x = torch.ones(2, 5, device=device, requires_grad=True)
    kl = kl_divergence(x * x, torch.ones(2, 5, device=device))
    (dx,) = torch.autograd.grad(kl.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient has no gradient of its own"):
        dx.sum().backward()


def test_no_tile_is_wider_than_a_row_needs():
    for v in (1, 2, 100, 4096, 151936):
        tile = choose_tile(v)
        assert tile.block_v == min(4096, 1 << (v - 1).bit_length()) and 1 <= tile.warps <= 8


@traced
def test_opcheck_of_every_op(generator):
    student, teacher = draw(generator, "cpu", 3, 24)
    torch.library.opcheck(OPS.kl_divergence.default, (student.clone().requires_grad_(), teacher, 2.0, ""))
    _, *sums = OPS.kl_divergence(student, teacher, 2.0, "")
    torch.library.opcheck(OPS.kl_divergence_backward.default, (torch.ones(3), student, teacher, *sums, 2.0, ""))


@traced
def test_it_compiles_to_one_graph_with_its_gradient(generator):
    student, teacher = draw(generator, "cpu", 3, 24)
    student.requires_grad_()

    def mean(student, teacher):
        return kl_divergence(student, teacher, temperature=2.0).mean()

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(run(student, teacher), student)[0] for run in (compiled, mean))
    assert torch.allclose(got, want, atol=1e-7)


@traced
def test_traced_for_a_gpu_it_is_one_launch_forward_and_one_backward(monkeypatch):
    pretend_sm_90(monkeypatch)
    with FakeTensorMode():
        x, rows = torch.ones(3, 448, device="cuda"), torch.ones(3, device="cuda")
        assert traced_launches(kl_divergence, x, x)[0] == [["kl_ptr", "student_sum_ptr", "teacher_sum_ptr"]]
        backward = lambda *args: OPS.kl_divergence_backward(*args, 2.0, "")  # noqa: E731
        assert traced_launches(backward, rows, x, x, rows, rows)[0] == [["ds_ptr"]]
