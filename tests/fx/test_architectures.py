"""Architectures of Transformers go through capture and match unchanged: every layer accounted for, nothing touched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gs_algos.fx.capture.capture import capture
from gs_algos.fx.op_names import SITES
from gs_algos.fx.patterns import match
from tests.nets.transformers_models import ARCHITECTURES, tiny

FOLDED = {"ResNetConfig": 6, "RegNetConfig": 17, "MobileNetV2Config": 52}
REFUSED = {
    "AlbertConfig": "called 2 times",
    "GPT2Config": "Conv1D multiplies by its parameter with a matrix product",
    "MixtralConfig": "functional linear",
    "Wav2Vec2Config": "re-parametrized",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_accounted_for_and_nothing_is_touched(name):
    model, inputs = tiny(name)
    model.train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = [dict(module.__dict__) for module in model.modules()]
    seed = torch.get_rng_state()
    graph = capture(model, (), inputs)
    matches, refusals = match(graph, model)
    assert graph.tracer == "export", graph.notes

    found = [m.roles.get("conv") or m.roles.get("linear") for m in matches] + [r.site for r in refusals]
    counted = Counter(site for site in found if site)
    layers = [site for site, module in model.named_modules() if isinstance(module, SITES)]
    assert [site for site in layers if counted[site] != 1] == []
    assert sum("bn" in m.roles for m in matches) == FOLDED.get(name, 0)
    assert REFUSED.get(name, "") in " ".join(r.reason for r in refusals)
    assert bool(refusals) == (name in REFUSED)

    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    for module, before in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[key] is value for key, value in before.items())
