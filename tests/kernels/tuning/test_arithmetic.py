"""Which layers multiply integers on a GPU, and which floats: by what was measured, else by the peaks of the card."""

from dataclasses import replace

import pytest
import torch

from gs_kernels.tuning.arithmetic import Product, compare, prefers_floats
from gs_kernels.tuning.gpu_specs import CARDS
from gs_kernels.tuning.space import find_space
from gs_kernels.tuning.tables import Entry, Table

LINEAR = Product("qmatmul", 4096, 4096, 8, 16)
CONV = Product("qconv2d", 64, 576, 8, 16, 1, 64)
WITHOUT_INT8 = replace(CARDS["h100"], peaks={**CARDS["h100"].peaks, "int8": 100.0})


def entry(op: str, us: float, **problem: int) -> Entry:
    return Entry(problem, {name: values[0] for name, values in find_space(op).choices.items()}, us)


def table(*, linear: float, conv: float, m: int = 64) -> Table:
    """Of one number of rows, in which floats take 10 microseconds and integers as given."""
    sizes = {"n": 64, "k": 576, "groups": 1, "channels": 64}
    ops = {
        "qmatmul": (entry("qmatmul", 10.0, m=64, n=4096, k=4096, bits=8),),
        "qmatmul_int8": (entry("qmatmul_int8", linear, m=m, n=4096, k=4096, group=0),),
        "qconv2d": tuple(entry("qconv2d", us, m=64, **sizes, x_bits=b) for b, us in ((8, conv), (16, 10.0))),
    }
    return Table("a GPU", 90, 132, {}, ops)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("product", [LINEAR, CONV, replace(LINEAR, bits=4), replace(CONV, x_bits=32, groups=64)])
def test_no_known_card_is_predicted_to_multiply_floats_faster(product: Product, card: str):
    assert compare(product, None, CARDS[card]) is None


def test_a_card_whose_products_of_int8_are_slow_multiplies_floats_and_says_so():
    reason = compare(LINEAR, None, WITHOUT_INT8)
    assert reason is not None and "integers take" in reason and "predicted for NVIDIA H100 SXM5 80GB" in reason
    assert compare(replace(LINEAR, x_bits=32), None, WITHOUT_INT8) is None  # fp32 products are slower still


@pytest.mark.parametrize("product", [LINEAR, CONV])
def test_what_was_measured_decides_against_a_prediction(product: Product):
    slow, fast = table(linear=15.0, conv=15.0), table(linear=5.0, conv=5.0)
    assert compare(product, slow, CARDS["h100"]) == "integers take 1.50 times as long, measured"
    assert compare(product, fast, WITHOUT_INT8) is None


def test_times_of_other_problems_are_not_compared():
    assert compare(LINEAR, table(linear=15.0, conv=15.0, m=256), CARDS["h100"]) is None


def test_where_nothing_is_known_integers_are_multiplied():
    assert compare(LINEAR, None, None) is None and prefers_floats(LINEAR, torch.device("cpu")) is None
