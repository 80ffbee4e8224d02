"""The tracers of `capture`: each reads what the one before cannot, names live modules, and leaves the model alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gs_algos.fx.capture.capture import capture
from gs_algos.fx.graph import Node, SiteGraph
from tests.nets.graphs import (
    Chain,
    ConvCalledTwice,
    DropPath,
    FlatOpaque,
    Functional,
    Opaque,
    UnknownToExport,
    fork,
    image,
)


def ops_of(graph: SiteGraph) -> list[str]:
    return [node.op for node in graph.nodes]


def of_module(graph: SiteGraph, name: str) -> Node:
    (node,) = graph.calls(name)
    return node


def test_export_gives_canonical_ops_edges_and_live_names():
    net = Chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.ReLU6(inplace=True), flat=nn.Flatten())
    graph = capture(net, image())
    assert graph.tracer == "export" and graph.notes == ()
    assert ops_of(graph) == ["input", "conv2d", "batch_norm", "relu6", "flatten", "output"]
    conv = of_module(graph, "conv")
    assert (conv.inputs, conv.users, conv.weight, conv.shape) == ((0,), (2,), "conv.weight", (2, 4, 6, 6))


def test_a_padded_conv_is_one_node():
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), image())
    assert ops_of(graph) == ["input", "conv2d", "output"]
    assert of_module(graph, "0").inputs == (0,)


def test_a_module_called_twice_has_two_nodes():
    assert len(capture(ConvCalledTwice(), image(4)).calls("conv")) == 2


def test_a_module_with_two_names_is_known_by_the_first():
    conv = nn.Conv2d(4, 4, 1)
    graph = capture(nn.Sequential(conv, conv), image(4))
    assert [node.module for node in graph.nodes if node.op == "conv2d"] == ["0", "0"]


def test_functional_weights_are_named():
    graph = capture(Functional(), image())
    assert [(node.module, node.weight) for node in graph.nodes if node.op in ("conv2d", "linear")] == [
        (None, "w1"),
        (None, "heads.0"),
    ]


def test_identity_is_looked_through_and_dropout_is_not():
    net = Chain(conv=nn.Conv2d(3, 4, 3), same=nn.Identity(), bn=nn.BatchNorm2d(4), drop=nn.Dropout(), act=nn.ReLU())
    assert ops_of(capture(net, image())) == ["input", "conv2d", "batch_norm", "dropout", "relu", "output"]


def test_stochastic_depth_is_seen_in_eval_mode():
    net = Chain(conv=nn.Conv2d(3, 4, 3), path=DropPath(), bn=nn.BatchNorm2d(4))
    graph = capture(net, image())
    between = graph.nodes[of_module(graph, "conv").users[0]]
    assert (between.op, between.scope) == ("other", "path")


def test_a_region_under_autocast_is_read_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.bn(self.conv(x))

    graph = capture(Net(), image())
    assert ops_of(graph) == ["input", "conv2d", "batch_norm", "output"]
    assert of_module(graph, "bn").inputs == (of_module(graph, "conv").index,)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_are_looked_into(wrap):
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3)))
    prefix = next(iter(model._modules))
    assert capture(model, image()).calls(f"{prefix}.0")


def test_what_export_cannot_follow_is_read_by_symbolic_trace():
    graph = capture(UnknownToExport(), image())
    assert graph.tracer == "symbolic_trace" and graph.notes[0].startswith("export: ")
    assert of_module(graph, "bn").inputs == (of_module(graph, "conv").index,)
    assert of_module(graph, "fc").shape == (2, 5)


def test_what_no_tracer_can_follow_is_read_child_by_child():
    graph = capture(Opaque(), image())
    assert graph.tracer == "children"
    assert [note.partition(":")[0] for note in graph.notes] == ["export", "symbolic_trace"]
    assert of_module(graph, "body.1").inputs == (of_module(graph, "body.0").index,)
    assert of_module(graph, "head").inputs == () and of_module(graph, "head").users == ()


def test_a_child_called_twice_gives_its_nodes_twice():
    class Twice(Opaque):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    assert len(capture(Twice(), image()).calls("body.0")) == 2


def test_the_last_rung_knows_which_leaves_ran_in_order():
    graph = capture(FlatOpaque(), image())
    assert graph.tracer == "walk" and len(graph.notes) == 3
    assert [(node.op, node.module) for node in graph.nodes] == [
        ("conv2d", "conv"),
        ("batch_norm", "bn"),
        ("linear", "head"),
    ]


def test_the_last_rung_sees_functions_on_parameters():
    class Tied(FlatOpaque):
        def forward(self, x):
            return F.linear(super().forward(x), self.head.weight.t())

    readers = [node.target for node in capture(Tied(), image()).nodes if node.module is None]
    assert readers == ["t"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_child_is_one_opaque_call_and_the_rest_is_read():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))
    graph = capture(nn.Sequential(nn.Conv2d(3, 3, 1), scripted), image())
    assert graph.calls("0") and len(graph.notes) >= 1


def test_keyword_inputs_and_structured_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, *, scale=None):
            y = self.fc(x)
            return {"y": y * scale, "more": [y, (None, "text")]}

    graph = capture(Net(), torch.ones(2, 4), {"scale": torch.ones(2, 4)})
    assert graph.tracer == "export" and len(graph.nodes[-1].inputs) == 2


class Restless(nn.Module):
    """Changes everything a forward pass can change, and overrides `train`."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(1))
        self.history: list[int] = []

    def train(self, mode: bool = True):
        raise AssertionError("capture must not call train")

    def forward(self, x):
        self.count.add_(1)
        self.last = self.bn(self.conv(x))
        self.history.append(random.randint(0, 9))
        return self.last + torch.rand(1)


class OpaqueRestless(Restless):
    def forward(self, x):
        return fork(super().forward(x))


@pytest.mark.parametrize("kind", [Restless, OpaqueRestless])
def test_nothing_is_left_behind(kind):
    net, x = kind(), image()
    net.bn.training = False
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes, flags = set(net.__dict__), [module.training for module in net.modules()]
    seed, python_seed, x_before = torch.get_rng_state(), random.getstate(), x.clone()
    capture(net, x)
    assert [module.training for module in net.modules()] == flags
    assert set(net.__dict__) == attributes and net.history == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed) and random.getstate() == python_seed
    assert torch.equal(x, x_before)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_user_hooks_survive():
    net, seen = nn.Sequential(nn.Conv2d(3, 4, 3)), []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    capture(net, image())
    seen.clear()
    net(image())
    assert seen == [1]


def test_inputs_that_do_not_fit_are_the_users_error():
    with pytest.raises(ValueError, match=r"example_inputs must run through the model, got RuntimeError: .*channels"):
        capture(nn.Sequential(nn.Conv2d(4, 4, 3)), image(3))


def test_lazy_modules_are_the_users_error():
    with pytest.raises(ValueError, match="got lazy '0'; run one forward pass first"):
        capture(nn.Sequential(nn.LazyConv2d(4, 3)), image())


def test_a_failing_tracer_prints_nothing(capfd):
    capture(Opaque(), image())
    assert capfd.readouterr() == ("", "")


class Cache:
    """Grows by each call, as the key-value caches of language models do; nothing of torch knows it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


class Remembering(nn.Module):
    """Adds what it saw before, and gives up if that has another size; its path depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, cache):
        cache.seen.append(x)
        return fork(self.fc(x)) if len(cache.seen) == 1 else self.fc(torch.cat(cache.seen)) + x


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Remembering(), nn.Linear(6, 3)

    def forward(self, x, cache=None):
        return fork(self.head(self.first(x, Cache() if cache is None else cache)))


def test_what_a_forward_grows_is_as_it_was_for_every_tracer():
    cache, x = Cache(), torch.randn(2, 6)
    for kwargs in ({}, {"cache": cache}):
        graph = capture(Cached(), x, kwargs)
        assert {node.module for node in graph.nodes if node.module} == {"first.fc", "head"}
    assert cache.seen == []


def test_a_child_that_fails_by_itself_is_a_note():
    class Once(nn.Module):
        """Runs only while its parent does."""

        def __init__(self, calls):
            super().__init__()
            self.fc, self.calls = nn.Linear(6, 6), calls

        def forward(self, x):
            if not self.calls():
                raise RuntimeError("only from my parent")
            return fork(self.fc(x))

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = False
            self.child, self.head = Once(lambda: self.inside), nn.Linear(6, 3)

        def forward(self, x):
            self.inside = True
            try:
                return fork(self.head(self.child(x)))
            finally:
                self.inside = False

    graph = capture(Parent(), torch.randn(2, 6))
    assert graph.tracer == "walk" and [node.module for node in graph.nodes if node.module] == ["child.fc", "head"]
    assert "child: children: RuntimeError: only from my parent" in graph.notes
