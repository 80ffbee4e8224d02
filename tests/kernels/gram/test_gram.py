"""Facts of summing products of columns beyond the reference: exactness, symmetry, work, errors."""

import pytest
import torch

from gs_kernels import gram_
from gs_kernels.aot import launches_of
from gs_kernels.aot.ir_cost import work_of
from gs_kernels.gram import spec
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import DEVICE, same_bits


def whole(*shape, most=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-most, most + 1, shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [5, 300])
def test_sums_of_whole_numbers_are_exact_and_symmetric(k, dtype):
    x = whole(70, k, dtype=dtype)
    total = torch.ones(k, k, device=DEVICE)
    gram_(total, x)
    assert torch.equal(total.double(), x.double().T @ x.double() + 1)
    assert torch.equal(total, total.T)


def test_products_of_fp32_are_not_rounded_to_fewer_bits():
    x = torch.tensor([[4097.0, 4095.0]], device=DEVICE)
    total = torch.zeros(2, 2, device=DEVICE)
    gram_(total, x)
    assert float(total[0, 1]) == 4097.0 * 4095.0


def test_differences_of_halves_near_each_other_are_exact():
    x = whole(40, 9, most=100, dtype=torch.float16) + 300
    floats = x + whole(40, 9, most=3, dtype=torch.float16)
    total = torch.zeros(9, 9, device=DEVICE)
    gram_(total, x, floats)
    assert torch.equal(total.double(), (floats.double() - x.double()).T @ x.double())


def test_without_a_token_the_sums_stay():
    total = whole(4, 4)
    before = total.clone()
    gram_(total, whole(0, 4))
    assert same_bits(total, before)


def test_autograd_notices_that_the_sums_changed():
    total, x = whole(4, 4), whole(3, 4)
    version = total._version
    gram_(total, x)
    assert total._version > version


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (TypeError, "total must be a float32 tensor, got torch.float16", (torch.zeros(2, 2).half(), torch.ones(3, 2))),
        (ValueError, r"total must be a contiguous \[K, K\]", (torch.zeros(2, 3), torch.ones(3, 2))),
        (ValueError, r"total must be a contiguous \[K, K\]", (torch.zeros(2, 4)[:, ::2], torch.ones(3, 2))),
        (ValueError, r"x must have shape \[3, 2\], got \[3, 4\]", (torch.zeros(2, 2), torch.ones(3, 4))),
        (ValueError, r"x must have shape \[5, 3, 2\], got \[3, 2\]", (torch.zeros(5, 2, 2), torch.ones(3, 2))),
        (TypeError, "x must be float32 / float16 / bfloat16", (torch.zeros(2, 2), torch.ones(3, 2).int())),
        (ValueError, r"floats must have shape \[3, 2\]", (torch.zeros(2, 2), torch.ones(3, 2), torch.ones(1, 2))),
        (ValueError, "x must be on the device of total", (torch.zeros(2, 2), torch.ones(3, 2, device="meta"))),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(error, words, arguments):
    with pytest.raises(error, match=words):
        gram_(*arguments)
    assert not arguments[0].any()


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
def test_opcheck():
    for groups, cross in ((1, False), (2, True)):
        case = spec.make(spec.shape(groups, 5, 3, cross), torch.float32, DEVICE, torch.Generator(DEVICE))
        x, total, floats = case.args
        torch.library.opcheck(torch.ops.gs_kernels.gram_.default, (total, x, floats, ""))


@pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels cannot be compiled in this process")
def test_the_symmetric_sum_takes_half_of_the_products():
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
    flops = {case.name: work_of(launches_of(case, "sm_90")[0]).flops for case in spec.AOT[:2]}
    tokens, k = 2048, 4096
    assert flops == {
        "k4096-bf16": {"16bit": tokens * k * (k + 128)},
        "k4096-cross-bf16": {"16bit": 2 * tokens * k * k},
    }
