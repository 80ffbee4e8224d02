"""The divergence on a CPU, in C++ for each set of instructions that it has and without a compiler, against fp64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gs_kernels import kl_divergence
from gs_kernels.cpu import compile
from gs_kernels.cpu import library as native
from gs_kernels.kl_divergence import cpu
from gs_kernels.kl_divergence.ref import kl_divergence_backward_ref, kl_divergence_ref, log_sums_ref
from gs_kernels.kl_divergence.spec import GRAD_TOL
from gs_kernels.runtime import instructions
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import fenced, poisoned_outputs, relative_rms, same_bits

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the CPU path does not run")

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).parents[3]


def functions_of(name):
    """The C++ for one set of instructions, or None if this CPU lacks it."""
    if not all(map(instructions.has, instructions.REQUIRED[name])):
        return None
    declared, found = cpu.kernels(), native.open_library(native.path_of(name))
    for function in cpu.FUNCTIONS:
        getattr(found, function).argtypes = getattr(declared, function).argtypes
        getattr(found, function).restype = None
    return found


@pytest.fixture(params=compile.instruction_sets())
def instruction_set(request, monkeypatch):
    """Has calls take the C++ for one set of instructions."""
    if cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")
    functions = functions_of(request.param)
    if functions is None:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(cpu, "kernels", lambda: functions)


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(cpu, "kernels", lambda: None)


def draw(*sizes, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sizes, generator=generator) * spread for _ in range(2))


def exact(student, teacher, temperature):
    """Divergence, log-sums, and the gradient of the divergence, in fp64."""
    u, v = student.double() / temperature, teacher.double() / temperature
    q, p = u.softmax(-1), v.softmax(-1)
    kl = (torch.special.xlogy(p, p) - p * u.log_softmax(-1)).sum(-1)
    return kl, u.logsumexp(-1), v.logsumexp(-1), (q - p) / temperature


def check(student, teacher, temperature):
    """Compares values, sums and the gradient, whose rows are weighed."""
    want, *sums, gradient = exact(student, teacher, temperature)
    dy = torch.linspace(0.5, 2, want.numel()).view(want.shape)
    with poisoned_outputs():
        kl, *got = cpu.kl_divergence_cpu(student, teacher, temperature)
        ds = cpu.kl_divergence_backward_cpu(dy, student, teacher, *got, temperature)
    torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=2e-6 / temperature)
    for a, b in zip(got, sums, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=5e-7)
    assert ds.dtype == student.dtype and ds.is_contiguous()
    wanted = gradient * dy[..., None]
    if student.dtype == torch.float32 and student.shape[-1] > 1:
        assert relative_rms(ds, wanted) < 2e-6
    else:
        assert relative_rms(ds, wanted) < GRAD_TOL[student.dtype]


@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 33, 1000, 1024, 1025, 4099])
def test_each_set_of_instructions_gives_what_fp64_gives(v, instruction_set):
    for temperature in (0.5, 1.0, 4.0):
        check(*(fenced(x, "sliced") for x in draw(5, v)), temperature)


@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, DTYPES), ids=str)
def test_each_has_its_own_dtype(dtypes, instruction_set):
    for v in (1, 17, 1000):
        check(*(x.to(dtype) for x, dtype in zip(draw(3, v), dtypes, strict=True)), 2.0)


def test_the_way_without_a_compiler_gives_what_fp64_gives(without_cpp):
    for v, dtype in itertools.product((1, 17, 4099), DTYPES):
        check(*(x.to(dtype) for x in draw(5, v)), 2.0)


def test_sums_over_many_classes_lose_nothing(instruction_set):
    zeros = torch.zeros(2, 49152)
    kl, *sums = cpu.kl_divergence_cpu(zeros, zeros + 7, 1.0)
    assert kl.tolist() == [0.0, 0.0] and sums[0].tolist() == [torch.tensor(49152.0).log().item()] * 2
    student, teacher = draw(3, 49152)
    want, *wanted, _ = exact(student, teacher, 2.0)
    kl, *sums = cpu.kl_divergence_cpu(student, teacher, 2.0)
    torch.testing.assert_close(kl.double(), want, rtol=4e-7, atol=0)
    for a, b in zip(sums, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.2e-7, atol=0)  # an ulp


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_largest_logit_may_lie_anywhere(order, instruction_set):
    """Sums of the classes before are then of numbers that have become as small as can be."""
    ramp = torch.linspace(-3e3, 3e3, 5000)
    ramp = ramp if order == "rising" else ramp.flip(0)
    student, teacher = torch.stack([ramp / 2, ramp.flip(0), ramp]), torch.stack([ramp, ramp, ramp / 3])
    kl, *sums = cpu.kl_divergence_cpu(student, teacher, 1.0)
    want, *wanted, _ = exact(student, teacher, 1.0)
    assert want.min() > 0.05 and want.max() > 5e3
    torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=0)
    for a, b in zip(sums, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.2e-7, atol=0)


def test_logits_at_the_ends_of_fp32(instruction_set):
    """Masks are often the lowest number that there is, and a row of nothing else is one of equal logits."""
    lowest = torch.finfo(torch.float32).min
    teacher = torch.tensor([[lowest] * 3 + [1.0] * 30, [lowest] * 33])
    student = torch.tensor([[lowest] * 3 + [1.0] * 29 + [2.0], [0.0] * 33])
    kl, want = cpu.kl_divergence_cpu(student, teacher, 1.0)[0], exact(student, teacher, 1.0)[0]
    torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=2e-6)


def special_rows():
    """Rows of 3000 with what is not finite: alone, in whole blocks, at the first and the last class."""
    plain = draw(1, 3000)
    for value in (NAN, INF, -INF):
        for where in (slice(0, 1), slice(2999, 3000), slice(0, 1100), slice(1500, 3000), slice(None)):
            for spoiled in ((0,), (1,), (0, 1)):
                pair = [x.clone() for x in plain]
                for i in spoiled:
                    pair[i][0, where] = value
                yield pair


def test_what_is_not_finite_gives_what_it_gives_the_reference(instruction_set):
    pairs = list(special_rows())
    student, teacher = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    kl, *sums = cpu.kl_divergence_cpu(student, teacher, 2.0)
    want = kl_divergence_ref(student, teacher, temperature=2.0)
    torch.testing.assert_close(kl, want, rtol=1e-5, atol=4e-6, equal_nan=True)
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    ds = cpu.kl_divergence_backward_cpu(torch.ones(len(kl)), student, teacher, *sums, 2.0)
    wanted = kl_divergence_backward_ref(
        torch.ones(len(kl)), student, teacher, *log_sums_ref(student, teacher, temperature=2.0), temperature=2.0
    )
    infinite = (student.isposinf() | teacher.isposinf()).any(-1)
    assert ds[infinite].isnan().all()  # all of the row: a softmax with an infinite logit is none
    torch.testing.assert_close(ds[~infinite], wanted[~infinite], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_a_class_that_vanishes_counts_for_nothing_and_one_that_does_not_is_infinitely_far(instruction_set):
    teacher = torch.tensor([[0.0] * 20 + [-120.0], [0.0] * 20 + [-80.0]])
    student = torch.tensor([0.0] * 20 + [-INF]).repeat(2, 1)
    kl = cpu.kl_divergence_cpu(student, teacher, 1.0)[0]
    assert kl.tolist() == [pytest.approx(0.0, abs=1e-6), INF]


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_threads_change_no_bit(rows, monkeypatch):
    monkeypatch.setattr(cpu, "PARALLEL_FROM", 1)
    (student, teacher), dy = draw(rows, 1300), torch.ones(rows)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = cpu.kl_divergence_cpu(student, teacher, 2.0)
            ds = cpu.kl_divergence_backward_cpu(dy, student, teacher, *found[1:], 2.0)
            results.append((*found, ds))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rows_may_lie_anywhere():
    whole, other = draw(4, 6, 40)
    views = {
        "rows apart": (whole[..., 3:20], other[..., 5:22]),
        "every other row": (whole[:, ::2], other[:, ::2]),
        "one row for all": (whole, other[:1, :1].expand(4, 6, 40)),
        "classes apart": (whole[..., ::2], other[..., ::2]),
        "reversed axes": (whole.transpose(0, 2), other.transpose(0, 2)),
        "shifted tokens": (whole[:, :-1], other[:, 1:]),
        "one class": (whole[..., :1], other[..., :1]),
        "one row": (whole[0, 0], other[0, 0]),
    }
    for name, (student, teacher) in views.items():
        want, _, _, gradient = exact(student, teacher, 1.0)
        leaf = student.detach().requires_grad_()
        kl = kl_divergence(leaf, teacher)
        dy = torch.ones(()).expand(kl.shape)
        (ds,) = torch.autograd.grad(kl, leaf, dy)
        torch.testing.assert_close(kl.detach().double(), want, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(ds.double(), gradient, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


GUARDED = """
import itertools, torch
from tests.kernels.guard import guarded
from gs_kernels.cpu import compile
from gs_kernels.kl_divergence import cpu
from tests.kernels.kl_divergence.test_cpu import DTYPES, draw, functions_of
of_sets = list(filter(None, map(functions_of, compile.instruction_sets())))
assert of_sets
made = torch.empty
for functions, v, dtypes, at_end in itertools.product(
    of_sets, (1, 2, 15, 16, 17, 1000, 1031), itertools.product(DTYPES, DTYPES), (True, False)
):
    student, teacher = (guarded(x.to(dtype), at_end) for x, dtype in zip(draw(2, v), dtypes))
    torch.empty = lambda *args, **kwargs: guarded(made(*args, **kwargs), at_end)
    kl, *sums = cpu._run(functions, student, teacher, 2.0)
    ds = cpu._run_backward(functions, torch.ones(2), student, teacher, *sums, 2.0)
    torch.empty = made
    assert kl.isfinite().all() and ds.isfinite().all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory as Linux does")
def test_nothing_outside_of_the_rows_is_touched():
    if cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")
    done = subprocess.run([sys.executable, "-c", GUARDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]


def test_code_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "_self_test", lambda functions: False)
    monkeypatch.setattr(native, "_problems", {})
    cpu.kernels.cache_clear()
    try:
        student, teacher = draw(3, 20)
        want = kl_divergence_ref(student, teacher)
        torch.testing.assert_close(kl_divergence(student, teacher), want, rtol=1e-5, atol=4e-6)
        assert "kl_divergence run as tensor operations" in caplog.text
    finally:
        cpu.kernels.cache_clear()
