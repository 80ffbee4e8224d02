"""A teacher that is trained beside its student: its loss, its tensors in the prepared network, resuming, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gs_algos
from gs_algos import SCOP, Adder, Distill, SimQAT
from gs_algos.pipeline.pipeline import Pipeline
from tests.distill.test_distill import TARGET, Stopped, Trainer, small, trained, wanted
from tests.nets.convolutional import SmallConvNet, images


def step(net: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None


def test_the_twin_adds_its_own_loss_and_is_trained_as_if_alone():
    net, twin = small(), small(1)
    alone = copy.deepcopy(twin)
    algo = Distill(logits=0.7, labels=0.2, temperature=3.0, teacher=twin, train_teacher=True)
    net = algo.apply(net, images()).train()
    loss_fn = algo.loss(F.cross_entropy)
    for turn in range(2):
        x = images(seed=turn)
        # copies: a forward in training mode moves the statistics of norms
        own = F.cross_entropy(copy.deepcopy(alone.train())(x), TARGET)
        student, teacher = copy.deepcopy(net), copy.deepcopy(alone)
        want = wanted(student, teacher, x, labels=0.2, logits=0.7, t=3.0) + own
        loss = loss_fn(net(x), TARGET)
        torch.testing.assert_close(loss, want)
        step(net, loss)
        step(alone, F.cross_entropy(alone(x), TARGET))
        algo.step()
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in twin.state_dict().items())
    converted = algo.convert(net)
    assert converted.state_dict().keys() == small().state_dict().keys()


@pytest.mark.parametrize("inner", [None, "simqat", "scop", "adder"])
def test_an_optimizer_of_the_prepared_network_trains_the_copy_too(inner):
    inners = {"simqat": SimQAT, "scop": lambda: SCOP(rate=0.5, select_steps=2), "adder": Adder}
    algo = Distill(None if inner is None else inners[inner](), train_teacher=True, features=1.0, kind="kernel")
    net = algo.apply(small(), images())
    twin = algo.teacher
    first = [p.detach().clone() for p in twin.parameters()]
    assert not {id(p) for p in twin.parameters()} - {id(p) for p in net.parameters()}
    trained(net, algo, 4)
    assert all(not torch.equal(p, old) for p, old in zip(twin.parameters(), first, strict=True))
    net = algo.convert(net.eval())
    assert not any("distill" in name for name in net.state_dict()) and algo.teacher is None


def test_the_twin_follows_the_mode_of_its_student():
    net = small()
    algo = Distill(train_teacher=True)
    net = algo.apply(net, images()).eval()
    statistics = [b.clone() for b in algo.teacher.buffers()]
    algo.loss(F.cross_entropy)(net(images()), TARGET)
    assert all(torch.equal(b, old) for b, old in zip(algo.teacher.buffers(), statistics, strict=True))


def test_the_twin_moves_to_another_dtype_with_its_student():
    algo = Distill(train_teacher=True)
    net = algo.apply(small(), images()).double()
    algo.loss(F.cross_entropy)(net(images().double()), TARGET).backward()
    assert {t.dtype for t in algo.teacher.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("given", [False, True], ids=["copy", "given"])
def test_an_interrupted_training_goes_on_with_the_trained_twin(given, tmp_path):
    def stages() -> list[gs_algos.Algorithm]:
        teacher = small(1) if given else None
        return [SCOP(rate=0.5, select_steps=2), Distill(SimQAT(), teacher, features=1.0, train_teacher=True)]

    whole = Pipeline(stages()).run(small(), images(), Trainer()).eval()
    with pytest.raises(Stopped):
        Pipeline(stages(), tmp_path).run(small(), images(), Trainer(2))
    net = Pipeline(stages(), tmp_path).resume(SmallConvNet, images(), Trainer()).eval()
    assert torch.equal(net(images()), whole(images()))


def test_a_resumed_twin_computes_with_the_tensors_of_the_checkpoint(tmp_path):
    algo = Distill(Adder(), train_teacher=True)
    net = algo.apply(small(), images())
    trained(net, algo, 2)
    want = algo.loss(F.cross_entropy)(net.eval()(images()), TARGET)
    gs_algos.save(net, tmp_path)
    algo = Distill.resume(gs_algos.load(tmp_path, SmallConvNet).eval())
    net = algo._model
    algo.teacher = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="must be of the form of the one that the training began with, got"):
        algo.loss(F.cross_entropy)(net(images()), TARGET)
    algo.teacher = small(3)
    assert torch.equal(algo.loss(F.cross_entropy)(net(images()), TARGET), want)


def test_what_a_twin_cannot_do_is_refused():
    with pytest.raises(ValueError, match="train_teacher must be True or False, got 'twin'"):
        Distill(train_teacher="twin")
    with pytest.raises(ValueError, match="teacher_rows must be None where the teacher is trained"):
        Distill(train_teacher=True, teacher_rows=2)
    frozen, net = small(1).requires_grad_(False), small()
    with pytest.raises(ValueError, match=r"Distill.apply: .* must have parameters that take gradients, got none"):
        Distill(teacher=frozen, train_teacher=True).apply(net, images())
    algo = Distill(train_teacher=True)
    net = algo.apply(net, images())
    with pytest.raises(ValueError, match="must have targets, got None"):
        algo.loss(F.cross_entropy)(net(images()), None)
