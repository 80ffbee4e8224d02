"""What rounding one weight is predicted to cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gs_algos.analysis.sensitivity import sensitivity
from gs_algos.quant.packed.grid import grid_of
from gs_algos.quant.scheme import Scheme

SCHEMES = ("int4@channel:minmax:sym", "int8@channel:minmax:sym")


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        return self.fc((x + self.b(x).relu()).mean((2, 3)))


class Tokens(nn.Module):
    """Two readers of one tensor, and a residual that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.q, self.k, self.out, self.head = (nn.Linear(16, n) for n in (16, 16, 16, 20))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) * 1
        y = torch.tanh(self.q(x)) * self.k(x)
        x += self.out(y)
        return self.head(x)


def conv() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Conv().eval(), [torch.randn(32, 3, 6, 6) for _ in range(8)]


def divergence(net: nn.Module, site: str, scheme: str, batches: list[torch.Tensor]) -> float:
    """Returns the mean KL divergence of a network with one rounded weight, measured."""
    rounded = copy.deepcopy(net)
    weight = rounded.get_submodule(site).weight
    rows = weight.detach().flatten(1)
    grid = grid_of(rows, Scheme.parse(scheme, "weight"))
    weight.data = grid.values(grid.codes(rows)).view_as(weight)
    total = count = 0
    with torch.no_grad():
        for x in batches:
            p, q = (F.log_softmax(n(x).flatten(0, -2), -1) for n in (net, rounded))
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


@pytest.mark.parametrize("site", ["a", "b", "fc"])
def test_it_is_near_the_divergence_that_is_measured(site: str):
    net, _ = conv()
    batches = [torch.randn(128, 3, 6, 6) for _ in range(8)]
    scores = sensitivity(net, batches, {site: SCHEMES}, by="gradient").scores[site]
    assert scores[SCHEMES[0]] == pytest.approx(divergence(net, site, SCHEMES[0], batches), rel=0.35)
    assert 0 < scores[SCHEMES[1]] < 0.02 * scores[SCHEMES[0]]  # a sixteenth of the step


def test_tokens_are_samples_of_their_own():
    torch.manual_seed(0)
    net, batches = Tokens().eval(), [torch.randint(20, (4, 24)) for _ in range(8)]
    found = sensitivity(net, batches, {"out": SCHEMES, "head": SCHEMES}, by="gradient")
    assert found.samples == 8 * 4 * 24
    for site in ("out", "head"):
        want = divergence(net, site, SCHEMES[0], batches)
        assert found.scores[site][SCHEMES[0]] == pytest.approx(want, rel=0.35)


def test_padding_does_not_count():
    torch.manual_seed(0)
    net, ids = Tokens().eval(), torch.randint(20, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[:, 4:] = 0
    assert sensitivity(net, [{"input_ids": ids, "attention_mask": mask}], {"out": SCHEMES}, by="gradient").samples == 8


def test_padding_alone_is_refused():
    ids = torch.randint(20, (2, 6))
    with pytest.raises(ValueError, match="one token at least must count, got attention masks"):
        sensitivity(
            Tokens(), [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], {"out": SCHEMES}, by="gradient"
        )


def test_readers_of_one_tensor_are_found():
    found = sensitivity(
        Tokens(), [torch.randint(20, (2, 6))], dict.fromkeys(("q", "k", "out", "head"), SCHEMES), by="gradient"
    )
    assert found.readers == (("q", "k"), ("out",), ("head",))


def test_the_network_is_left_as_it_was():
    net, batches = conv()
    net.train()
    net.a.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    sensitivity(net, batches[:1], {"a": SCHEMES}, by="gradient")
    assert net.training and not net.a.weight.requires_grad and net.b.weight.requires_grad
    assert not net.a._forward_hooks and net.b.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_seeds_give_the_same_scores_again():
    net, batches = conv()
    first, second = (sensitivity(net, batches[:2], {"a": SCHEMES}, seed=3, by="gradient").scores for _ in range(2))
    assert first == second


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("net", "batches", "words"),
    [
        (Scalar(), [], "at least one batch must be given"),
        (
            Scalar(),
            [torch.randn(2, 4)],
            r"must return logits \[B, classes\] or \[B, T, classes\], got outputs \[2, 1\]",
        ),
        (nn.Sequential(nn.Linear(4, 3)), [torch.full((2, 4), float("nan"))], "finite logits, got NaN"),
    ],
)
def test_what_gives_no_scores_is_refused(net: nn.Module, batches: list[torch.Tensor], words: str):
    with pytest.raises(ValueError, match=words):
        sensitivity(net, batches, {"0" if isinstance(net, nn.Sequential) else "fc": SCHEMES}, by="gradient")


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


@pytest.mark.parametrize("by", ["gradient", "nsr", "kl"])
def test_a_layer_with_a_forward_of_its_own_is_run_by_it(by):
    torch.manual_seed(0)
    net = nn.Sequential(PadsItself(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    plain = copy.deepcopy(net)
    plain[0] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2))
    plain[0][1].load_state_dict(net[0].state_dict())
    x = torch.randn(4, 3, 8, 8)
    own, other = (sensitivity(n, [x], {name: SCHEMES}, by=by).scores[name] for n, name in ((net, "0"), (plain, "0.1")))
    assert own == pytest.approx(other, rel=1e-3)
    assert "0" in sensitivity(net, [x], SCHEMES, by="nsr").scores
