"""Facts of quantized keys and values that no comparison with the reference shows: where is written, errors, tracing."""

import pytest
import torch

from gs_kernels import kv_read, kv_write_
from gs_kernels.kv_cache.ref import pack_halves, unpack_halves
from tests.helpers import DEVICE, fenced, same_bits


def empty(*form, four=False, groups=1):
    *rows, size = form
    width, dtype = ((size + 1) // 2, torch.uint8) if four else (size, torch.int8)
    codes = torch.zeros(*rows, width, dtype=dtype, device=DEVICE)
    return codes, torch.zeros(*rows, groups, device=DEVICE)


def drawn(*sizes):
    return torch.randn(*sizes, generator=torch.Generator(device=DEVICE).manual_seed(0), device=DEVICE)


def at(position):
    return torch.tensor([position], device=DEVICE)


def test_a_token_has_the_scale_of_its_largest_number():
    codes, scale = empty(1, 1, 1, 3)
    kv_write_(codes, scale, torch.tensor([[[[1.0, -127.0, 2.5]]]], device=DEVICE))
    assert codes.flatten().tolist() == [1, -127, 2] and scale.item() == 1.0


def test_groups_of_a_token_have_scales_of_their_own():
    codes, scale = empty(1, 1, 1, 4, four=True, groups=2)
    kv_write_(codes, scale, torch.tensor([[[[-8.0, 7.0, 0.25, 2.0]]]], device=DEVICE))
    assert scale.flatten().tolist() == [1.0, -0.25]
    assert unpack_halves(codes, 4).flatten().tolist() == [-8, 7, -1, -8]


def test_a_token_of_zeros_has_scale_one():
    codes, scale = empty(1, 1, 2, 5)
    kv_write_(codes, scale, torch.zeros(1, 1, 2, 5, device=DEVICE))
    assert (codes == 0).all() and (scale == 1).all()


def test_packed_halves_come_back_also_of_odd_sizes():
    codes = torch.arange(-8, 7, dtype=torch.int8)
    assert unpack_halves(pack_halves(codes), 15).tolist() == codes.tolist()
    assert pack_halves(codes).shape == (8,)


@pytest.mark.parametrize("four", [False, True])
def test_nothing_but_the_new_tokens_is_written(four):
    codes, scale = (fenced(t, "sliced") for t in empty(2, 3, 9, 6, four=four))
    around = [t._base.clone() for t in (codes, scale)]
    kv_write_(codes, scale, drawn(2, 3, 4, 6), at(3))
    for t, before in zip((codes, scale), around, strict=True):
        before.as_strided(t.shape, t.stride(), t.storage_offset())[:, :, 3:7] = t[:, :, 3:7]
        assert same_bits(t._base, before)
        assert (t[:, :, 3:7] != 0).any()


def test_tokens_that_come_one_by_one_are_those_that_come_together():
    x, (codes, scale), (codes_one, scale_one) = drawn(2, 2, 5, 8), empty(2, 2, 7, 8), empty(2, 2, 7, 8)
    kv_write_(codes, scale, x, at(2))
    for i in range(5):
        kv_write_(codes_one, scale_one, x[:, :, i : i + 1], at(2 + i))
    assert torch.equal(codes, codes_one) and torch.equal(scale, scale_one)


@pytest.mark.parametrize(("four", "most"), [(False, 0.5 / 127), (True, 0.5 / 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_read_differs_by_half_a_step_or_at_the_short_end_of_4_bits_by_one(four, most, dtype):
    x, (codes, scale) = drawn(2, 3, 5, 10).to(dtype), empty(2, 3, 5, 10, four=four)
    kv_write_(codes, scale, x)
    y = kv_read(codes, scale, size=10, dtype=dtype)
    assert y.dtype == dtype
    largest = x.float().abs().amax(-1, keepdim=True)
    short = (x.float() / scale.view(*x.shape[:-1], 1) > 7.5) & four  # beyond the largest code, 7
    error = (y - x).float().abs() / largest
    assert bool((error[~short] <= most + 1e-3).all()) and bool((error <= 2 * most + 1e-3).all())


def test_a_compiled_function_writes_into_the_cache():
    x, held, want = drawn(1, 2, 3, 8), empty(1, 2, 4, 8), empty(1, 2, 4, 8)
    kv_write_(*want, x, at(1))

    def step(codes, scale, x, position):
        kv_write_(codes, scale, x, position)
        return kv_read(codes, scale, size=8)

    y = torch.compile(step, backend="aot_eager", fullgraph=True)(*held, x, at(1))
    assert torch.equal(held[0], want[0]) and torch.equal(y, kv_read(*want, size=8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.zeros(1, 2, 4, 8)}, "codes must be a tensor of int8 or uint8, got torch.float32"),
        ({"codes": torch.zeros(1, 2, 4, 7, dtype=torch.int8)}, "codes must have 8 in a row"),
        ({"scale": torch.zeros(1, 2, 4, 3)}, "groups must divide 8 elements, got 3"),
        ({"scale": torch.zeros(1, 2, 3, 1)}, "codes and scale must be"),
        ({"x": torch.zeros(1, 2, 5, 8)}, r"x must be \[1, 2, 1..4, D\]"),
        ({"x": torch.zeros(1, 2, 1, 8, dtype=torch.int32)}, "x must be a float32"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, "position must be one int64"),
    ],
)
def test_errors_name_what_does_not_fit(change, words):
    given = {"codes": torch.zeros(1, 2, 4, 8, dtype=torch.int8), "scale": torch.zeros(1, 2, 4, 1)}
    given |= {"x": torch.zeros(1, 2, 1, 8), "position": None}
    with pytest.raises((TypeError, ValueError), match=f"kv_write_: {words}"):
        kv_write_(**(given | change))
