"""Calibration takes what loaders give: labels are left out where that is clear, and refused where it is not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gs_algos import SCOP, SLB, Prune, SimQAT

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
MASK = torch.ones(8)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Masked(Plain):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fc(x) if mask is None else self.fc(x) * mask[:, None]


class Pair(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 3)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return self.fc(p) + self.other(q)


PREPARED: dict[Any, Any] = {}


def prepared(make: Callable[[], nn.Module], example: Any) -> tuple[nn.Module, SimQAT]:
    key = (make, str(type(example)))
    if key not in PREPARED:
        algo = SimQAT()
        PREPARED[key] = (algo.apply(make(), example), algo)
    net, algo = copy.deepcopy(PREPARED[key])
    algo._bind(net)
    return net, algo


def ranges(net: nn.Module) -> Tensor:
    return net.fc.input_quantizer.range.clone()


WANT = torch.stack([-2 * X.min(), 2 * X.max()])
LOADER = DataLoader(TensorDataset(2 * X, Y), batch_size=4)
TAKEN: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "loader of pairs": (Plain, X, LOADER),
    "loader of single tensors": (Plain, X, DataLoader(TensorDataset(2 * X), batch_size=4)),
    "list of pairs, tuple example": (Plain, (X,), [[2 * X, Y]]),
    "inputs alone": (Plain, X, [2 * X]),
    "generator": (Plain, X, (2 * x for x in (X[:4], X[4:]))),
    "mask by keyword": (Masked, X, [{"x": 2 * X, "mask": MASK}]),
    "mask as in the example": (Masked, (X, MASK), [(2 * X, MASK)]),
    "mapping with labels": (Masked, {"x": X}, [{"x": 2 * X, "labels": Y}]),
    "two inputs": (Pair, (X, X), [(2 * X, X)]),
    "two inputs and a label": (Pair, (X, X), [(2 * X, X, Y)]),
    "two inputs in a tuple, and a label": (Pair, (X, X), [((2 * X, X), Y)]),
}


@pytest.mark.parametrize("make, example, batches", TAKEN.values(), ids=TAKEN)
def test_calibration_takes_the_inputs_of_a_batch(make, example, batches):
    net, algo = prepared(make, example)
    algo.calibrate(net, batches)
    assert torch.equal(ranges(net), WANT)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Any, type[Exception], str]] = {
    "labels that could be a mask": (
        *(Masked, X, LOADER, ValueError),
        r"form of the example inputs, got 2 elements, which forward\(x.*, mask.*\) .* would take all",
    ),
    "mapping of unknown names": (
        *(Plain, X, [{"image": X, "label": Y}], ValueError),
        r"got a mapping of image, label for forward\(x.*\).*; give the inputs alone, \(batch\['image'\] for batch",
    ),
    "one tensor": (
        Plain,
        X,
        X,
        ValueError,
        r"batch by batch, got one tensor of shape \(8, 6\); give a list, \[inputs\]",
    ),
    "one mapping": (Plain, X, {"x": X}, ValueError, "got one mapping; give a list"),
    "function": (Plain, X, lambda net: net(X), TypeError, "got a function; give forward_loop="),
    "number": (Plain, X, 3, TypeError, "such as a DataLoader, got int"),
    "text": (Plain, X, "images", TypeError, "such as a DataLoader, got str"),
    "empty generator": (Plain, X, iter(()), ValueError, "at least one batch must run"),
}


@pytest.mark.parametrize("make, example, batches, kind, words", REFUSED.values(), ids=REFUSED)
def test_what_is_not_clear_is_refused_and_leaves_the_ranges(make, example, batches, kind, words):
    net, algo = prepared(make, example)
    before = ranges(net)
    with pytest.raises(kind, match=rf"SimQAT\.calibrate: .*{words}"):
        algo.calibrate(net, batches)
    assert torch.equal(ranges(net), before)


def test_a_loader_given_as_forward_loop_is_a_type_error():
    net, algo = prepared(Plain, X)
    with pytest.raises(TypeError, match="forward_loop must be a function of the model, got DataLoader; give batches="):
        algo.calibrate(net, forward_loop=LOADER)


def test_it_is_said_once_which_part_of_a_batch_is_taken(caplog):
    net, algo = prepared(Plain, X)
    with caplog.at_level(logging.INFO, "gs_algos.core.batches"):
        algo.calibrate(net, LOADER)
    assert [r.message for r in caplog.records if "batch" in r.message] == [
        "SimQAT.calibrate: takes the first element of each batch of 2 elements"
    ]


def test_a_resumed_algorithm_goes_by_the_forward():
    net, _ = prepared(Plain, X)
    SimQAT.resume(net).calibrate(net, LOADER)
    assert torch.equal(ranges(net), WANT)


def test_slb_says_that_float_activations_have_no_ranges(caplog):
    algo = SLB(weight="int2@channel", total_steps=2)
    net = algo.apply(Plain(), X)
    algo.calibrate(net, LOADER)
    assert "SLB.calibrate: activations stay float" in caplog.text


def norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_batch_norms_are_measured_on_the_inputs_of_a_batch():
    net, algo = norms(), SLB(weight="int2@channel", total_steps=2)
    algo.calibrate_norms(algo.apply(net, X), LOADER)
    assert int(net[1].num_batches_tracked) == 2
    net, algo = norms(), Prune()
    algo.refresh(algo.apply(net, X), LOADER)
    assert int(net[1].num_batches_tracked) == 2


@pytest.mark.parametrize("batches, words", [([], "at least one batch"), ([X, X[:, :2]], "must run through the model")])
def test_a_refresh_that_fails_leaves_the_statistics(batches, words):
    net, algo = norms(), Prune()
    algo.apply(net, X)
    net[1].running_mean.fill_(3)
    with pytest.raises(ValueError, match=rf"Prune\.refresh: .*{words}"):
        algo.refresh(net, batches)
    assert net[1].running_mean.tolist() == [3] * 8


def test_the_generator_of_knockoffs_takes_the_images_of_pairs():
    images = torch.randn(4, 1, 8, 8)
    algo = SCOP(knockoffs="generator")
    algo.fit_knockoffs([(images, Y[:4])], steps=1)
    assert algo.source(((images,), {}), 4)[0][0].shape == images.shape
    with pytest.raises(TypeError, match=r"fit_knockoffs: batches must be read several times, got an iterator"):
        algo.fit_knockoffs(iter([images]))


@pytest.mark.parametrize("make", [lambda: SCOP(select_steps=2), lambda: Prune(importance="taylor", select_steps=2)])
def test_a_cut_is_not_decided_by_nothing(make):
    algo = make()
    net = algo.apply(norms(), X)
    algo.step()
    with pytest.raises(RuntimeError, match=r"step: the first 2 steps must show .* got no gradient in any; run batches"):
        algo.step()
    net.eval()(X).sum().backward()
    with pytest.raises(RuntimeError, match=r"weights must stand still .* call model\.train\(\) first"):
        algo.step()


RULES = {
    "dict": ({"fc": None}, r"got a dict; use \[\('fc', None\)\]"),
    "one rule": (("fc", {"act": None}), r"got one rule; use \[\('fc', \{'act': None\}\)\]"),
    "text": ("fc", r"got 'fc'; for example \[\('fc', None\)\]"),
}


@pytest.mark.parametrize("rules, words", RULES.values(), ids=RULES)
def test_rules_that_are_no_list_are_answered_with_one(rules, words):
    with pytest.raises(TypeError, match=rf"SimQAT: rules must be a list of \(pattern, options\), {words}"):
        SimQAT(rules=rules)
