"""Linears whose forward writes the product itself are packed as any other, if that is all they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import quantize_weights
from gs_algos.ptq.weights import plan_weights
from gs_algos.quant.packed.module import Packed


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight.t())
        return y.view(x.size()[:-1] + (self.out_features,))  # noqa: RUF005  as Transformers writes it


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias) / 2


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight).T + self.bias


class Branched(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias if x.sum() > 0 else x


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def net(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 16))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def vectors() -> Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


BUILDS = [lambda: Transposed(16, 16), lambda: Transposed(16, 16, bias=False), lambda: Flat(16, 16)]


@pytest.mark.parametrize("build", BUILDS, ids=["matmul", "matmul without bias", "addmm"])
def test_a_product_written_out_is_packed_saved_and_loaded(build: Any, tmp_path: Path):
    plain = net(nn.Linear(16, 16, bias=build().bias is not None))
    model = net(build())
    model.load_state_dict(plain.state_dict())
    wanted = quantize_weights(plain, "int8@channel", progress=False)(vectors())
    model = quantize_weights(model, "int8@channel", progress=False)
    assert isinstance(model[0], Packed) and torch.equal(model(vectors()), wanted)
    again = gs_algos.load(gs_algos.save(model, tmp_path), lambda: net(build()))
    assert torch.equal(again(vectors()), wanted)


@pytest.mark.parametrize("kind", [Halved, Squared, Branched, Turned])
def test_one_that_does_more_stays_float_and_is_a_line(kind: type[nn.Linear]):
    plan = plan_weights(net(kind(16, 16)), "int8@channel")
    assert [(row.site, row.reason) for row in plan.kept()] == [("0", f"{kind.__name__} has a forward of its own")]


def test_a_forward_that_was_put_on_the_object_is_not_read():
    model = net(Transposed(16, 16))
    model[0].forward = lambda x: x
    assert plan_weights(model, "int8@channel").kept()[0].reason == "its forward was replaced on the object"


def test_a_falcon_is_packed_in_memory_and_on_disk(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from gs_algos.llm.folder import read_folder
    from gs_algos.llm.quantize_checkpoint import quantize_checkpoint

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    config = transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(1, 13).view(2, 6)
    model.save_pretrained(tmp_path / "float")
    written = quantize_checkpoint(tmp_path / "float", tmp_path / "packed", "int8@channel", progress=False)
    kinds = {row.kind for row in written.plan.acted()}
    assert "FalconLinear" in kinds and read_folder(tmp_path / "packed", "test") is not None
    quantized = quantize_weights(model, "int8@channel", progress=False)
    assert sum(isinstance(m, Packed) for m in quantized.modules()) >= 4
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, quantized(ids).logits)
