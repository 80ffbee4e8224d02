"""Timing on a GPU, with a GPU that is a clock: a kernel takes 10 us, a graph starts in 6, a launch takes 100."""

import contextlib

import pytest
import torch

from gs_kernels.tuning import graph_timing
from gs_kernels.tuning.graph_timing import copies_beyond_cache, repeats_of, round_times

KERNEL_US, START_US, LAUNCH_US = 10.0, 6.0, 100.0


class Clock:
    """Stands for torch.cuda. sizes: of the graphs that were captured, in calls."""

    def __init__(self):
        self.us, self.sizes, self.capturing, self.order = 0.0, [], None, []

    def call(self, copy):
        if self.capturing is None:
            self.us += LAUNCH_US + KERNEL_US
        else:
            self.capturing.calls += 1
            self.order.append(copy)
        return torch.ones(1)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
            self.sizes.append(graph.calls)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    class Graph:
        calls = 0

        def replay(self):
            clock.us += START_US + KERNEL_US * self.calls

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.us = clock.us

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.us - self.us) / 1e3

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {"CUDAGraph": Graph, "Event": Event, "Stream": Stream, "graph": clock.graph, "current_stream": Stream}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


def test_the_start_of_a_graph_and_the_launches_of_the_cpu_are_lost_in_a_millisecond(clock):
    ms, graph = round_times([lambda: clock.call(0), lambda: clock.call(1)], 1e-4)
    assert graph and len(ms) >= 5
    assert all(1e3 * one == pytest.approx(KERNEL_US, rel=0.01) for one in ms)
    assert clock.sizes == [2, 2 * 39]  # 26 us a replay of one round
    assert clock.order[2:6] == [0, 1, 0, 1]


def test_a_call_that_cannot_be_captured_is_timed_as_it_is_launched(clock):
    def synchronizing():
        if clock.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return clock.call(0)

    ms, graph = round_times([synchronizing], 1e-4)
    assert not graph and 1e3 * ms[0] == pytest.approx(KERNEL_US + LAUNCH_US)


def test_a_long_round_is_not_repeated_and_a_short_one_not_without_end():
    assert [repeats_of(ms, 2) for ms in (5.0, 1.0, 0.26, 0.0)] == [1, 1, 4, 2000]


def test_operands_are_twice_the_cache_and_never_less_than_two(monkeypatch):
    props = type("P", (), {"L2_cache_size": 60 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: props)
    assert [copies_beyond_cache(mb << 20, "cuda") for mb in (1, 10, 60, 1000)] == [121, 13, 3, 2]
    assert copies_beyond_cache(1, "cuda") == graph_timing.COPIES_MAX
    assert copies_beyond_cache(1, "cpu") == 1
