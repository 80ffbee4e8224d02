"""The blocks of a network are found by the tensors that go from module to module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gs_algos.ptq.blocks import Block, find_blocks
from tests.nets.transformers_models import tiny


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class WithMemory(nn.Module):
    """A block that also reads what the first block read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, memory):
        return self.b(self.a(x)) + memory


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WithMemory() for _ in range(3))

    def forward(self, x):
        start = x * 1
        x = start
        for layer in self.layers:
            x = layer(x, start)
        return x


def sites(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def names(net: nn.Module, x: object, blocks: str = "auto") -> list[tuple[str, ...]]:
    return [block.names for block in find_blocks(net.eval(), sites(net), x, blocks)]


def test_residual_blocks_are_the_chain_not_the_layers_in_them():
    net = nn.Sequential(*(Residual() for _ in range(4)))
    assert names(net, torch.ones(2, 4)) == [("0",), ("1",), ("2",), ("3",)]


def test_a_stem_and_a_norm_join_the_block_behind_them():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Residual(), Residual(), nn.LayerNorm(4), Residual())
    assert names(net, torch.ones(2, 4)) == [("0", "1", "2"), ("3",), ("4", "5")]


def test_layers_of_a_plain_sequence_are_blocks_of_their_own():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    assert names(net, torch.ones(2, 4)) == [("0",), ("1", "2"), ("3", "4")]


def test_fewer_than_three_blocks_are_the_whole_network():
    assert names(nn.Sequential(Residual(), Residual()), torch.ones(2, 4)) == [("",)]


def test_a_block_that_is_called_twice_is_in_no_chain():
    block = Residual()
    net = nn.Sequential(Residual(), block, block, Residual(), Residual(), Residual())
    assert names(net, torch.ones(2, 4)) == [("3",), ("4",), ("5",)]


def test_blocks_that_read_an_earlier_activation_beside_are_no_chain():
    assert names(Remembering(), torch.ones(2, 4)) == [("",)]


def test_layers_of_a_transformer_with_masks_are_the_chain():
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, **heads))
    inputs = {"input_ids": torch.arange(8).view(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    chain = names(net, inputs)
    assert [block[-1] for block in chain] == [f"model.layers.{i}" for i in range(4)]


@pytest.mark.parametrize("name", ["ResNetConfig", "ConvNextConfig", "MobileNetV2Config"])
def test_chains_of_convolutional_networks_start_at_the_stem(name):
    net, inputs = tiny(name)
    chain = names(net, inputs)
    assert len(chain) > 3
    assert chain[0][0].startswith(("embed", "conv_stem"))


def test_blocks_are_named_by_an_expression():
    net = nn.Sequential(*(Residual() for _ in range(4)))
    assert names(net, torch.ones(2, 4), "re:[12]") == [("1",), ("2",)]
    assert names(net, torch.ones(2, 4), "none") == [("",)]


@pytest.mark.parametrize(
    ("blocks", "told"),
    [("re:nothing", "matches none"), ("re:0|2", "the very tensor"), ("re:1|1.a", "the very tensor")],
)
def test_an_expression_that_names_no_chain_is_refused(blocks, told):
    net = nn.Sequential(*(Residual() for _ in range(4)))
    with pytest.raises(ValueError, match=told):
        names(net, torch.ones(2, 4), blocks)


def test_a_block_holds_the_layers_inside_it():
    assert Block(("a", "b")).holds("a.x") and not Block(("a", "b")).holds("ab.x") and Block(("",)).holds("any")
