"""How packed products are tiled: what the rules choose, and who computes which share of the blocks of all tiles."""

import itertools
from dataclasses import replace

import pytest

from gs_kernels.qmatmul.spec import LAYERS
from gs_kernels.qmatmul.tiles import Plan, choose_int8_plan, choose_plan, default_rule, plan_of
from gs_kernels.tuning.gpu_specs import CARDS, assumed

ON_H100 = {"x_bits": 16, "levels": False, "sm": 90, "sm_count": 132}


def test_few_rows_share_k_and_many_are_dense():
    few = choose_plan(1, 4096, 4096, 4, **ON_H100)
    assert few.scale_parts and few.block_m == 16 and (few.shares, few.per_sm) == (264, 2)
    some = choose_plan(256, 14336, 4096, 4, **ON_H100)
    assert not some.dense and not some.scale_parts and some.block_m == 256 and some.shares == 0
    assert choose_plan(256, 14336, 4096, 8, **ON_H100) == replace(some, block_m=128)
    assert choose_plan(256, 8192, 8192, 4, **ON_H100).block_m == 128  # one wave of 128 tiles, where 64 fill half
    assert choose_plan(2048, 14336, 4096, 4, **ON_H100).block_m == 256
    assert choose_plan(2049, 14336, 4096, 4, **ON_H100).dense
    assert choose_plan(512, 14336, 4096, 4, **(ON_H100 | {"sm": 120})).block_m == 128
    assert choose_plan(513, 14336, 4096, 4, **(ON_H100 | {"sm": 120})).dense
    assert choose_plan(17, 4096, 4096, 4, **(ON_H100 | {"levels": True})).dense
    assert choose_plan(17, 4096, 4096, 4, **(ON_H100 | {"x_bits": 32})).dense
    assert choose_plan(2049, 4096, 4096, 4, **(ON_H100 | {"sm": 80})).dense
    # an A100 writes and reads a bf16 weight of 33.5 MB in 33 us, a third of what the product of 1,024 rows takes it
    assert choose_plan(1024, 4096, 4096, 4, **(ON_H100 | {"sm": 80, "sm_count": 108})).block_m == 64


def test_an_unknown_gpu_takes_the_rules_below_it():
    for newer, known in ((103, 100), (89, 80), (75, 80)):
        plans = [choose_plan(64, 4096, 4096, 4, **(ON_H100 | {"sm": sm})) for sm in (newer, known)]
        tiles = [(plan.block_m, plan.block_n, plan.warps, plan.stages) for plan in plans]
        assert tiles[0] == tiles[1]


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_sms_have_as_much_to_do_as_one_another_where_shares_of_it_are_sooner(name):
    card = CARDS[name]
    machine = {"sm": card.sm, "sm_count": card.sm_count}
    with assumed(card):
        for (n, k), m, bits in itertools.product(LAYERS, (1, 16, 32, 64, 256, 512), (1, 2, 4, 8)):
            plan = choose_plan(m, n, k, bits, x_bits=16, levels=False, **machine)
            rule = replace(default_rule(m, machine["sm"]), others=(), timed=True)
            shared = plan_of(rule, m, n, k, bits, x_bits=16, **machine)
            for one in (plan, shared):
                tiles, blocks = -(-m // one.block_m) * -(-n // one.block_n), k // 128
                busiest = -(-tiles // card.sm_count) * blocks
                if one.shares:
                    starts = [rank * tiles * blocks // one.shares for rank in range(0, one.shares + 1, one.per_sm)]
                    assert len(starts) == card.sm_count + 1 and one.per_sm <= 2
                    busiest = max(b - a for a, b in itertools.pairwise(starts))
                    assert busiest < tiles * blocks / card.sm_count + 1, (m, n, k, bits)
                    even = tiles * blocks / card.sm_count / busiest
                    # on B200 loading x half as often gains more than shares of 3 and 4 blocks lose
                    assert even >= 0.95 or (name, one.block_n) == ("b200", 256), (m, n, k, bits)
            assert shared.shares


# (card, M, N, K, bits) -> whether programs take shares: by hand, from bytes over bandwidth, what the busiest SM issues,
# 1 us for the second launch, and parts of 512 bytes a row
SHARED = {
    ("h100", 1, 4096, 4096, 4): True,  # 32 tiles for 132 SMs
    ("h100", 1, 14336, 4096, 4): True,  # one program an SM waits for itself more than for memory
    ("h100", 1, 28672, 8192, 4): False,  # bytes: 36.5 us, with two programs on most SMs
    ("h100", 64, 28672, 8192, 1): False,  # parts of 16 MB
    ("h200", 64, 28672, 8192, 1): False,
    ("h200", 64, 8192, 8192, 4): True,  # x for 32 tiles of 256 columns, where 64 tiles load it twice
    ("h200", 1, 28672, 8192, 2): True,  # instructions: 13 us of bytes
    ("h200", 1, 28672, 8192, 1): True,
}


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shares_are_taken_where_they_are_predicted_to_be_sooner(case):
    name, m, n, k, bits = case
    with assumed(CARDS[name]):
        assert (choose_plan(m, n, k, bits, **ON_H100).shares > 0) is SHARED[case]


def test_some_rows_get_tiles_of_256_columns_where_loading_x_takes_longest():
    """Two tiles of 128 columns load the same x twice: 16 KB a block for 8 KB of 4-bit weights, 2 KB of 1-bit ones."""
    with assumed(CARDS["h200"]):
        some = choose_plan(64, 8192, 8192, 4, **ON_H100)
        assert (some.block_m, some.block_n, some.warps, some.shares, some.per_sm) == (64, 256, 8, 132, 1)
        assert choose_plan(64, 8192, 8192, 1, **ON_H100).block_n == 128  # instructions decide, and two programs share
        assert choose_plan(32, 8192, 8192, 4, **ON_H100).block_n == 256
        assert choose_plan(16, 8192, 8192, 4, **ON_H100).block_n == 128
    assert choose_plan(64, 8192, 8192, 4, **(ON_H100 | {"sm": 120})).block_n == 128


def test_8_bit_products_share_as_float_ones_do():
    few = choose_int8_plan(1, 4096, 4096, 4, 128, points=False, fp8=False, sm=90, sm_count=132)
    assert (few.block_m, few.shares, few.per_sm, few.early) == (16, 264, 2, True)
    assert choose_int8_plan(1, 4096, 4096, 4, 128, points=False, fp8=False, sm=80, sm_count=108).early is False
    assert choose_int8_plan(1, 64, 128, 4, 128, points=False, fp8=False, sm=90, sm_count=132).shares == 0


def test_every_block_has_one_program_and_every_part_a_place_of_its_own():
    """What the kernels compute of program ids, in Python: parts of a tile lie side by side, in the order of K."""
    for tiles, blocks, shares, per_sm in itertools.product((1, 2, 5, 32), (1, 3, 32), (1, 2, 6, 30), (1, 2, 3)):
        total = tiles * blocks
        if shares > total or shares % per_sm:
            continue
        owner, places = {}, {}
        for pid in range(shares):
            rank = pid % (shares // per_sm) * per_sm + pid // (shares // per_sm)
            for block in range(rank * total // shares, (rank + 1) * total // shares):
                assert owner.setdefault(block, rank) == rank
                places.setdefault(block // blocks + rank, set()).add((block // blocks, rank))
        assert len(owner) == total and all(len(writers) == 1 for writers in places.values())
        assert max(places) < tiles + shares
        for tile in range(tiles):
            first, last = (((tile * blocks + b) * shares - 1) // total for b in (1, blocks))
            assert [owner[tile * blocks], owner[(tile + 1) * blocks - 1]] == [first, last]
            assert last - first + 1 <= Plan(shares=shares).parts(tiles, blocks)
            assert all((tile, rank) in places[tile + rank] for rank in range(first, last + 1))


def test_little_work_is_no_more_than_shares_of_three_blocks():
    rule, machine = replace(default_rule(1, 90), timed=True), {"x_bits": 16, "sm": 90, "sm_count": 132}
    shares = [plan_of(rule, 1, 64, k, 4, **machine).shares for k in (128, 768, 1280, 128 * 300)]
    assert shares == [0, 2, 3, 100]
    assert [choose_plan(1, 64, k, 4, **ON_H100).shares for k in (128, 640, 1280, 128 * 300)] == [0, 0, 3, 100]
    assert choose_plan(1, 64, 128 * 400, 4, **ON_H100).shares == 132
    assert plan_of(rule, 1, 64, 128 * 800, 4, **machine).shares == 264


def test_no_part_of_a_split_is_empty():
    for blocks in range(1, 80):
        for wanted in range(1, 40):
            partials = Plan(split_k=wanted).partials(blocks)
            assert 1 <= partials <= min(wanted, blocks) and (partials - 1) * -(-blocks // partials) < blocks
