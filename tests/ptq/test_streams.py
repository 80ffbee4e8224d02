"""What blocks get beside the tensor that goes from one to the next, found without running all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gs_algos.ptq.blocks import Block
from gs_algos.ptq.streams import ActivationStore, Arguments, Streams
from tests.nets.transformers_models import tiny_language_model


def test_arguments_of_all_blocks_are_those_of_a_whole_run():
    model = tiny_language_model("Gemma3TextConfig", num_hidden_layers=6, layer_types=None)
    layers = {f"model.layers.{number}": layer for number, layer in enumerate(model.model.layers)}
    batches = [
        {"input_ids": torch.randint(1, 90, (2, 8 + i), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    ]
    whole: list[dict[str, Arguments]] = []

    def hook(name):
        return lambda module, args, kwargs: whole[-1].update({name: Arguments(args, kwargs)})

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    model.config.use_cache = False
    for batch in batches:
        whole.append({})
        model(**batch)
    for handle in handles:
        handle.remove()
    runs = dict.fromkeys(layers, 0)

    def count(name):
        return lambda *_: runs.update({name: runs[name] + 1})

    for name, layer in layers.items():
        layer.register_forward_hook(count(name))
    with ActivationStore(2**30) as store, torch.no_grad():
        streams = Streams(model, batches, [Block((name,)) for name in layers], store, False, "test")
    for want, got in zip(whole, streams.arguments, strict=True):
        for name in layers:
            assert got[name].spec == want[name].spec
            for ours, theirs in zip(got[name].leaves, want[name].leaves, strict=True):
                assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
    assert len({id(one) for one in streams.arguments[1].values()}) == 2  # layers with a window, and without
    first = list(model.config.layer_types).index("full_attention")
    assert list(runs.values()) == [2] * first + [1] * (5 - first) + [0]


def test_a_batch_that_skips_a_block_is_refused():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for block in self.blocks[:2] if len(x) > 1 else self.blocks:
                x = block(x)
            return x

    blocks = [Block((f"blocks.{i}",)) for i in range(3)]
    with ActivationStore(2**20) as store, pytest.raises(ValueError, match=r"got one that skips blocks\.2"):
        Streams(Skipping(), [torch.zeros(2, 4)], blocks, store, False, "test")
