"""Inputs that do not run through a network: the error begins with the method that was called."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SCOP, SLB, Prune, SimQAT
from gs_algos.core.algorithm import InputsError
from tests.nets.convolutional import SmallConvNet

MAKE: dict[str, Callable[[], Any]] = {
    "SimQAT": SimQAT,
    "SLB": lambda: SLB(weight="2bit@channel", total_steps=2),
    "Prune": Prune,
    "SCOP": lambda: SCOP(select_steps=1),
}
INPUTS: dict[str, Any] = {
    "other channels": torch.randn(2, 5, 12, 12),
    "text": "picture",
    "none": None,
    "too many": (torch.randn(2, 1, 12, 12), torch.zeros(2)),
    "a name it has not": {"pixels": torch.randn(2, 1, 12, 12)},
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("method", ["plan", "apply"])
@pytest.mark.parametrize("name", MAKE)
def test_an_error_of_the_inputs_names_the_method(name, method, inputs):
    with pytest.raises(
        ValueError, match=rf"^{name}\.{method}: (the |example_)inputs must run through the model, got "
    ) as caught:
        getattr(MAKE[name](), method)(SmallConvNet(), INPUTS[inputs])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SimQAT", "SLB"])
def test_so_does_one_of_convert(name):
    algo, x = MAKE[name](), torch.randn(2, 1, 12, 12)
    net = algo.apply(SmallConvNet(), x)
    net(x)
    with pytest.raises(ValueError, match=rf"^{name}\.convert: the inputs must run through the model"):
        algo.convert(net.eval(), torch.randn(2, 5, 12, 12))


def test_the_error_can_cross_processes():
    with pytest.raises(InputsError) as caught:
        SimQAT().plan(nn.Linear(3, 3), torch.randn(2, 4))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.text == caught.value.text
