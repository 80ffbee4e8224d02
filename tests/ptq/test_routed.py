"""Mixtures of experts: layers that read some tokens only, and what the other tokens tell of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gs_algos import PTQ
from gs_algos.ptq.blocks import Block as Named
from gs_algos.ptq.blocks import recorded
from gs_algos.ptq.layer_inputs import Seen
from gs_algos.ptq.routed import Route, find_routes, places_of, row_keys
from gs_algos.ptq.transforms.stage import Scaled
from tests.ptq.test_ptq import calibrated

WIDTH, EXPERTS = 32, 4
RARE, IDLE = 2, 3  # experts of few tokens, and of none


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Sends each token to one of two experts by a sign, and what is large in one channel to a third."""

    def __init__(self, width: int = WIDTH, large: float = 2.0) -> None:
        super().__init__()
        self.large = large
        self.experts = nn.ModuleList(Expert(width) for _ in range(EXPERTS))

    def chosen(self, rows):
        return torch.where(rows[:, 1] > self.large, RARE, (rows[:, 0] > 0).long())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        chosen, y = self.chosen(rows), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).nonzero().flatten()
            if len(here):
                y[here] = expert(rows[here])
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), Mixture()

    def forward(self, x):
        return x + self.moe(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, attention_mask=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 5, seed: int = 1) -> list[torch.Tensor]:
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 32, WIDTH, generator=generator) @ mix / 4 for _ in range(count)]


@torch.no_grad()
def errors(model: nn.Module) -> dict[int, float]:
    """Returns the squared relative error of each expert of the second block, on other tokens that are its own."""
    floats = net()
    rows = torch.cat([floats.blocks[1].norm(floats.blocks[0](floats.stem(x))) for x in batches(40, seed=5)])
    rows = rows.reshape(-1, WIDTH)
    chosen = floats.blocks[1].moe.chosen(rows)
    found = {}
    for number, (ours, theirs) in enumerate(
        zip(model.blocks[1].moe.experts, floats.blocks[1].moe.experts, strict=True)
    ):
        own = rows if number == IDLE else rows[chosen == number]
        want = theirs(own)
        found[number] = float((ours(own) - want).square().sum() / want.square().sum())
    return found


def test_experts_of_few_tokens_are_rounded_for_those_of_the_others_too(monkeypatch):
    algo, model = calibrated(net(), batches())
    found = errors(model)
    rows = {layer.site: (layer.rows, layer.notes) for layer in algo.report.layers}
    few, told = rows[f"blocks.1.moe.experts.{RARE}.gate"]
    assert 0 < few < WIDTH and f"saw {few} tokens: all those of its block count as 16 more" in told
    assert rows[f"blocks.1.moe.experts.{IDLE}.down"] == (0, ("saw 0 tokens: all those of its block count as 32 more",))
    assert not rows["blocks.1.moe.experts.0.gate"][1]
    monkeypatch.setattr("gs_algos.ptq.block_loop.LENT", 0)
    alone = errors(calibrated(net(), batches())[1])
    assert found[RARE] < 0.9 * alone[RARE] and found[IDLE] < 0.7 * alone[IDLE], (found, alone)
    assert found[0] == alone[0] and found[1] == alone[1]


def test_padding_counts_for_nothing_in_experts():
    data = batches()
    want, _ = calibrated(net(), data)
    noise = [torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(len(data))]
    padded = [
        {"x": torch.cat([pad, x], 1), "attention_mask": torch.cat([torch.zeros(4, 8), torch.ones(4, 32)], 1)}
        for pad, x in zip(noise, data, strict=True)
    ]
    got, _ = calibrated(net(), padded)
    for ours, theirs in zip(got.report.layers, want.report.layers, strict=True):
        assert ours.rows == theirs.rows and abs(ours.ratio - theirs.ratio) < 1e-3, ours.site


def test_a_token_that_the_float_network_sends_elsewhere_is_its_own_float():
    torch.manual_seed(0)
    data = [torch.randn(8, WIDTH)]
    algo = PTQ(weight="int4@group:8")
    layer = algo.apply(net(), batches()[0]).blocks[0].moe.experts[0].gate
    rows, floats = data[0][:3], torch.randn(3, WIDTH)
    seen = Seen(layer, [[floats]], [[torch.tensor([7, 2, 5])]], True, Scaled())
    seen.update(0, [rows], [torch.tensor([2, 4, 5])], None, False)
    want = torch.stack([floats[1], rows[1], floats[2]])  # tokens 2 and 5 came in both
    torch.testing.assert_close(seen.statistics.cross[0], (want - rows).t() @ rows)
    torch.testing.assert_close(seen.float_sum[0], want.sum(0, dtype=torch.float64))


def test_rows_are_found_by_their_bits():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    order = torch.tensor([3, 49, 0, 17])
    assert places_of(row_keys(x[order]), row_keys(x)).tolist() == order.tolist()
    other = x[order].clone()
    other[1, 6] += 1
    assert places_of(row_keys(other), row_keys(x)).tolist() == [3, -1, 0, 17]
    assert places_of(row_keys(x[:2]), row_keys(x[:0])).tolist() == [-1, -1]


def test_routes_are_those_of_experts_and_of_no_other_layers():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.pooler = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 8)

        def forward(self, x):
            return self.pooler(self.inner[1](self.inner[0](x))[:, 0])

    model, x = Pooled(), torch.randn(2, 3, 8)
    with recorded(model.named_modules()) as calls:
        model(x)
    assert not find_routes(model, Named(("",)), ["inner.0", "inner.1", "pooler"], calls)
    model, sites = net(), [f"blocks.0.moe.experts.{i}.{name}" for i in range(EXPERTS) for name in ("gate", "down")]
    with recorded(model.named_modules()) as calls, torch.no_grad():
        model(batches()[0])
    routes = find_routes(model, Named(("blocks.0",)), [*sites, "stem"], calls)
    experts = [f"blocks.0.moe.experts.{i}" for i in range(EXPERTS)]
    assert routes == {
        f"{expert}.{name}": Route(module, "blocks.0.moe")
        for expert in experts
        for name, module in (("gate", f"{expert}.gate"), ("down", expert))
    }


def test_experts_of_a_model_of_transformers_are_found():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        **{"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
        **{"num_sparse_encoder_layers": 3, "num_experts": 2, "expert_capacity": 64, "dropout_rate": 0.0},
    )
    model = transformers.SwitchTransformersEncoderModel(config).eval()
    data = [{"input_ids": torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    algo = PTQ(weight="int4@group:16")
    algo.calibrate(algo.apply(model, data[0]), data)
    notes = [layer.notes for layer in algo.report.layers if ".experts." in layer.site]
    assert len(notes) == 12 and sum("count as" in "".join(one) for one in notes) > 0.9 * len(notes)
