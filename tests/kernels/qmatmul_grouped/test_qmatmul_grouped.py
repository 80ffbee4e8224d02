"""Products with the weights of experts beyond the conformance test: what is refused, traced, and told of tiles."""

from __future__ import annotations

import pytest
import torch

from gs_kernels import PackedWeight, dequantize_packed, pack_weight, qmatmul_grouped
from gs_kernels.qmatmul_grouped.cpu import qmatmul_grouped_cpu
from gs_kernels.qmatmul_grouped.spec import make, shape
from gs_kernels.qmatmul_grouped.tiles import choose_grouped_plan
from gs_kernels.runtime.torch_op import SOURCE
from tests.helpers import DEVICE, relative_rms, same_bits


def case(sizes: tuple[int, ...] = (2, 0, 3), **more) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    s = shape(sizes, 6, 64, 4, 32, **more)
    return make(s, torch.float32, DEVICE, torch.Generator(device=DEVICE).manual_seed(0)).args


def test_rows_of_one_expert_are_those_of_a_product_with_its_weight():
    x, weight, offsets = case()
    w = dequantize_packed(weight).view(3, 6, 64)
    want = torch.cat([x[:2] @ w[0].T, x[2:] @ w[2].T])
    assert relative_rms(qmatmul_grouped(x, weight, offsets), want) < 1e-5


def test_no_rows_give_none():
    x, weight, offsets = case()
    assert qmatmul_grouped(x[:0], weight, torch.zeros_like(offsets)).shape == (0, 6)


def test_results_do_not_depend_on_what_other_experts_get():
    x, weight, offsets = case((4, 4, 4))
    alone = torch.tensor([0, 4, 4], device=DEVICE)
    assert same_bits(qmatmul_grouped(x[4:8], weight, alone), qmatmul_grouped(x, weight, offsets)[4:8])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, o: (x.double(), w, o), TypeError, "x must be float32 / float16 / bfloat16, got float64"),
        (lambda x, w, o: (x[:, :32], w, o), ValueError, r"x must be \[M, K\] with K=64"),
        (lambda x, w, o: (x[None], w, o), ValueError, r"x must be \[M, K\]"),
        (lambda x, w, o: (x, w, o.float()), TypeError, "offsets must be int32 / int64, got float32"),
        (lambda x, w, o: (x, w, o[:0]), ValueError, "E a divisor of the 18 rows"),
        (lambda x, w, o: (x, w, torch.zeros(4, dtype=torch.int32)), ValueError, "E a divisor of the 18 rows"),
        (lambda x, w, o: (x, w, o, torch.zeros(6, device=DEVICE)), ValueError, r"bias must have shape \[18\]"),
        (lambda x, w, o: (x, w.codes, o), TypeError, "weight must be a PackedWeight"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words: str):
    with pytest.raises(error, match=words):
        qmatmul_grouped(*change(*case()))


@pytest.mark.parametrize(
    ("ends", "words"), [([3, 1, 6], "got 1 behind 3, for expert 1"), ([-1, 2, 6], "got -1"), ([2, 4, 9], "got 9")]
)
def test_offsets_that_fall_or_leave_the_rows_are_refused_on_a_cpu(ends: list[int], words: str):
    weight = pack_weight(torch.ones(18, 64, dtype=torch.uint8), torch.ones(18, 1), 8.0, bits=4, group_size=64)
    with pytest.raises(ValueError, match=rf"must not fall, and lie in 0\.\.6, the rows of x, {words}"):
        qmatmul_grouped_cpu(torch.ones(6, 64), weight, torch.tensor(ends), None)


def test_the_op_is_registered_as_torch_asks():
    x, weight, offsets = case((2, 0, 3), behind=1)
    from gs_kernels.pack.schema import flatten

    flat = (x.requires_grad_(), *flatten(weight), offsets, None, SOURCE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # a compiler's part is the next test
    torch.library.opcheck(torch.ops.gs_kernels.qmatmul_grouped.default, flat, test_utils=checks)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the plain form is that of a CPU")
def test_a_compiler_traces_it_without_a_break():
    x, weight, offsets = case((2, 0, 3), behind=1)
    compiled = torch.compile(qmatmul_grouped, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(x, weight, offsets), qmatmul_grouped(x, weight, offsets)) < 1e-5


GPU = {"x_bits": 16, "levels": False, "sm": 90, "sm_count": 132}


def test_tiles_follow_the_rows_of_one_expert_and_never_split():
    for m in (1, 8, 64, 1000, 1 << 20):
        for experts in (1, 8, 128):
            plan = choose_grouped_plan(m, experts, 1536, **GPU)
            assert not plan.dense and plan.split_k == 1 and plan.shares == 0
            assert plan.block_m <= 128 and (plan.block_m == 16) == (-(-m // experts) <= 16)
    assert choose_grouped_plan(4096, 8, 1536, **{**GPU, "x_bits": 32}).block_m == 16


@pytest.mark.parametrize(
    ("rows", "experts", "n", "block_n"),
    [
        (2, 8, 4096, 64),  # 64 tiles for 132 processors: twice as many
        (1, 16, 5120, 64),
        (8, 128, 2048, 128),  # 128 of them: halves would be two for most
        (128, 8, 4096, 128),
    ],
)
def test_tiles_are_halved_where_processors_would_be_idle(rows: int, experts: int, n: int, block_n: int):
    plan = choose_grouped_plan(rows, experts, n, **GPU)
    assert (plan.block_n, plan.warps) == (block_n, block_n // 32)
