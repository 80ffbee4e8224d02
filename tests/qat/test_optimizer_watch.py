"""An optimizer that trains none of the parameters which apply added is noticed; loops that are right never are."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gs_algos import SLB, SimQAT
from gs_algos.core.algorithm import Algorithm
from gs_algos.qat.slb.optim import SlbAdamW, SlbSGD


def net(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 4, bias))


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, 0.01)


def fused_adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, fused=True)  # no count of the tensors it writes


def train(
    model: nn.Module,
    algo: Algorithm,
    optimizers: Sequence[Optimizer],
    steps: int,
    late: bool = False,
    scaler: Any = None,
) -> None:
    """late: gradients are still there when the algorithm steps."""
    for _ in range(steps):
        loss = model(inputs()).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        if late:
            algo.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if not late:
            algo.step()


@pytest.mark.parametrize(
    "total_steps, bias, make",
    [(1, True, sgd), (3, False, sgd), (100, True, sgd), (100, True, fused_adamw), (100, False, fused_adamw)],
)
def test_an_optimizer_made_before_apply_is_refused(total_steps, bias, make):
    model, algo = net(bias), SLB(weight="2bit@channel", total_steps=total_steps)
    optimizer = make(model.parameters())
    algo.apply(model, inputs())
    with pytest.raises(RuntimeError, match=r"SLB\.step: an optimizer must train the logits.*make it after apply"):
        train(model, algo, [optimizer], 8)
    assert algo.steps < 3
    with pytest.raises(RuntimeError, match="an optimizer must train the logits"):
        algo.step()


def test_an_optimizer_of_the_replaced_weights_alone_is_refused():
    model, algo = net(), SLB(weight="2bit@channel", total_steps=100)
    optimizer = sgd([model[0].weight, model[2].weight])
    algo.apply(model, inputs())
    with pytest.raises(RuntimeError, match="an optimizer must train the logits"):
        train(model, algo, [optimizer], 40)


def train_dropping_gradients(model: nn.Module, algo: Algorithm, optimizer: Optimizer, steps: int) -> None:
    """The network drops its gradients before the algorithm steps, so that nobody sees them there."""
    for _ in range(steps):
        model(inputs()).square().mean().backward()
        optimizer.step()
        model.zero_grad()
        algo.step()


@pytest.mark.parametrize("make", [sgd, fused_adamw])
@pytest.mark.parametrize("total_steps, done", [(1, 0), (100, 2)])
def test_gradients_that_the_network_drops_are_seen_where_nothing_else_moves(make, total_steps, done):
    model, algo = net(bias=False), SLB(weight="2bit@channel", total_steps=total_steps)
    optimizer = make(model.parameters())
    algo.apply(model, inputs())
    with pytest.raises(RuntimeError, match=r"an optimizer must train the logits.*make it after apply"):
        train_dropping_gradients(model, algo, optimizer, 8)
    assert algo.steps == done


def test_gradients_of_fused_layers_that_the_network_drops_are_seen():
    model, algo = net(bias=False), SLB(weight="2bit@channel", total_steps=100, fused=True)
    optimizer = sgd(model.parameters())
    algo.apply(model, inputs())
    with pytest.raises(RuntimeError, match=r"SLB\.step: the logits of fused layers must be"):
        train_dropping_gradients(model, algo, optimizer, 8)


@pytest.mark.parametrize("make", [sgd, fused_adamw])
def test_a_loop_whose_network_drops_its_gradients_is_no_alarm(make):
    model, algo = net(bias=False), SLB(weight="2bit@channel", total_steps=100)
    before = make(model.parameters())
    algo.apply(model, inputs())
    train_dropping_gradients(model, algo, make(model.parameters()), 40)
    assert algo.steps == 40 and len(before.param_groups) == 1
    logits = model[0].search.logits
    assert not logits._post_accumulate_grad_hooks  # what watched is gone


def test_a_network_that_is_watched_can_be_copied_and_saved_whole(tmp_path):
    model, algo = net(bias=False), SLB(weight="2bit@channel", total_steps=100)
    algo.apply(model, inputs())
    torch.save(model, tmp_path / "net.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "net.pt", weights_only=False)):
        assert torch.equal(twin(inputs()), model(inputs()))
        twin(inputs()).sum().backward()
    assert not algo._logits_watch.logits.gradients.received.any


@pytest.mark.parametrize(
    "bias, late, make", [(True, True, sgd), (False, False, sgd), (True, False, fused_adamw), (False, True, fused_adamw)]
)
def test_an_optimizer_made_after_apply_is_not(bias, late, make):
    model, algo = net(bias), SLB(weight="2bit@channel", total_steps=100)
    before = make(model.parameters())  # of the float training, still there
    algo.apply(model, inputs())
    train(model, algo, [make(model.parameters())], 40, late)
    assert algo.steps == 40 and len(before.param_groups) == 1


@pytest.mark.parametrize("bias, late", [(True, False), (False, True)])
def test_steps_that_a_gradient_scaler_skips_are_no_alarm(bias, late):
    model, algo = net(bias), SLB(weight="2bit@channel", total_steps=100)
    before = sgd(model.parameters())
    algo.apply(model, inputs())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    train(model, algo, [sgd(model.parameters())], 40, late, scaler)
    assert algo.steps == 40 and len(before.param_groups) == 1


def test_steps_without_any_training_are_no_alarm():
    model, algo = net(), SLB(weight="2bit@channel", total_steps=4)
    before = sgd(model.parameters())
    algo.apply(model, inputs())
    for _ in range(4):
        algo.step()
    assert algo.steps == 4 and len(before.param_groups) == 1


@pytest.mark.parametrize("freeze", ["one before", "all before", "all after"])
def test_frozen_weights_stay_frozen_and_are_no_alarm(freeze):
    model, algo = net(), SLB(weight="2bit@channel", total_steps=100)
    if freeze != "all after":
        model[0].weight.requires_grad_(False)
    if freeze == "all before":
        model[2].weight.requires_grad_(False)
    optimizer = sgd(p for p in model.parameters() if p.dim() == 1)
    algo.apply(model, inputs())
    for logits in algo.logits() if freeze == "all after" else ():
        logits.requires_grad_(False)
    if freeze == "one before":
        optimizer = sgd(p for p in model.parameters() if p.requires_grad)
    train(model, algo, [optimizer], 8)
    assert not model[0].search.logits.requires_grad and algo.steps == 8


def test_logits_that_no_optimizer_has_are_a_warning(caplog):
    model, algo = net(), SLB(weight="2bit@channel", total_steps=100)
    algo.apply(model, inputs())
    with caplog.at_level(logging.WARNING):
        train(model, algo, [sgd(algo.parameters(model))], 8)
    assert [r.message for r in caplog.records if "no logit has moved in 3 steps" in r.message] and algo.steps == 8


def test_fused_layers_need_an_optimizer_of_their_own():
    model, algo = net(), SLB(weight="2bit@channel", total_steps=100, fused=True)
    algo.apply(model, inputs())
    with pytest.raises(
        RuntimeError, match=r"SLB\.step: the logits of fused layers must be .* make SlbAdamW\(algo\.fus"
    ):
        train(model, algo, [sgd(model.parameters())], 8)


@pytest.mark.parametrize("make", [SlbAdamW, SlbSGD])
def test_a_fused_optimizer_is_no_alarm(make):
    model, algo = net(), SLB(weight="2bit@channel", total_steps=100, fused=True)
    algo.apply(model, inputs())
    train(model, algo, [make(algo.fused_layers(), lr=0.1), sgd(algo.parameters(model))], 8)
    assert algo.steps == 8


def learned() -> tuple[nn.Module, SimQAT, Optimizer]:
    """A network prepared with learned steps, and an optimizer that was made before."""
    model, algo = net(), SimQAT(weight="int4@channel:lsq", act="int8@tensor:lsq")
    optimizer = fused_adamw(model.parameters())
    algo.apply(model, inputs())
    algo.calibrate(model, [inputs()])
    return model, algo, optimizer


def test_learned_steps_that_no_optimizer_has_are_refused():
    model, algo, optimizer = learned()
    with pytest.raises(RuntimeError, match=r"SimQAT\.step: the learned steps .*'params': algo\.learned_parameters\(\)"):
        train(model, algo, [optimizer], 8)


ENOUGH: dict[str, Callable[[nn.Module, SimQAT, Optimizer], Optimizer]] = {
    "made after": lambda model, algo, optimizer: fused_adamw(model.parameters()),
    "steps alone": lambda model, algo, optimizer: sgd(algo.learned_parameters()),
    "head alone": lambda model, algo, optimizer: sgd([model[2].bias]),
}


@pytest.mark.parametrize("choose", ENOUGH.values(), ids=ENOUGH)
def test_learned_steps_beside_other_optimizers_are_no_alarm(choose):
    model, algo, optimizer = learned()
    train(model, algo, [choose(model, algo, optimizer)], 40)
    assert algo.steps == 40


def test_learned_steps_in_a_group_of_their_own_or_frozen_are_no_alarm():
    model, algo, optimizer = learned()
    optimizer.add_param_group({"params": algo.learned_parameters()})
    train(model, algo, [optimizer], 8)
    model, algo, optimizer = learned()
    for parameter in algo.learned_parameters():
        parameter.requires_grad_(False)
    train(model, algo, [optimizer], 8)
    assert algo.steps == 8


@pytest.mark.parametrize("make", [SimQAT, lambda: SLB(weight="2bit@channel", total_steps=9)])
def test_an_algorithm_can_be_copied_and_pickled_while_it_watches(make):
    algo = make()
    algo.apply(net(), inputs())
    for twin in (copy.deepcopy(algo), pickle.loads(pickle.dumps(algo))):
        twin.step()
        assert twin.steps == 1 and algo.steps == 0
