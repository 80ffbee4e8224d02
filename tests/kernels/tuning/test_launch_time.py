"""What programs of a launch take together, worked out by hand for one card."""

from dataclasses import replace

import pytest

from gs_kernels.tuning.gpu_specs import CARDS, assumed, card_for, card_here
from gs_kernels.tuning.launch_time import HIDDEN, Program, launch_times

H100 = CARDS["h100"]  # 132 SMs, 3350 bytes a nanosecond, of which 0.7 us are on their way at a time
PROGRAM = Program(memory=1e6, through_l2=1e6, waiting=24576, products_us=0.0, issue_us=1.0, alone_us=1.5)


def test_memory_serves_programs_alike_wherever_they_run():
    """92 SMs have two programs, 40 have one: bytes take what bandwidth gives, instructions what the busiest issues."""
    got = launch_times(224, 2, PROGRAM, H100)
    assert got.bytes_us == pytest.approx(224e6 / 3350e3)
    assert got.instructions_us == 2.0


def test_few_programs_ask_for_too_little():
    assert launch_times(66, 2, PROGRAM, H100).bytes_us == pytest.approx(1e6 / (24576 / 0.7))


def test_a_last_wave_has_memory_for_itself_and_asks_for_less():
    """264 at a time, then 10."""
    full, rest = 264e6 / 3350e3, 1e6 / (24576 / 0.7)
    assert launch_times(274, 2, PROGRAM, H100).bytes_us == pytest.approx(full + rest)
    without = launch_times(274, 2, replace(PROGRAM, loops=False), H100)
    assert without.bytes_us == pytest.approx(274e6 / 3350e3)


def test_an_sm_gets_no_more_than_its_port_and_all_no_more_than_l2_gives():
    cached = replace(PROGRAM, memory=0.0)
    assert launch_times(1, 2, cached, H100).bytes_us == pytest.approx(1e6 / (64 * 1755))
    assert launch_times(264, 2, cached, H100).bytes_us == pytest.approx(264e6 / H100.l2_bandwidth / 1e3)


def test_one_program_alone_waits_for_itself_and_others_wait_for_their_turn():
    assert launch_times(132, 2, PROGRAM, H100).instructions_us == 1.5
    assert launch_times(133, 2, PROGRAM, H100).instructions_us == 2.0
    assert launch_times(133, 1, PROGRAM, H100).instructions_us == 3.0


def test_products_hide_what_others_issue_and_half_of_what_one_program_does():
    program = replace(PROGRAM, products_us=4.0)
    assert launch_times(264, 2, program, H100).products_us == 8.0
    assert launch_times(132, 1, program, H100).products_us == 4.0 + (1 - HIDDEN)


def test_plans_are_made_for_the_assumed_card_else_for_one_of_the_kind():
    with assumed(CARDS["h200"]):
        assert card_here(90, 132) is CARDS["h200"] and card_here(80, 108).name == CARDS["a100"].name
    assert card_here(90, 132).bandwidth == H100.bandwidth
    assert card_here(90, 66).bandwidth == H100.bandwidth / 2 and card_here(90, 66).sm_count == 66
    assert card_for("NVIDIA L40S", 89) is CARDS["a100"] and card_for("NVIDIA RTX 5090", 120) is CARDS["b200"]
    assert card_for("NVIDIA GH200 480GB", 90) is H100 and card_for("Tesla T4", 75) is CARDS["a100"]
