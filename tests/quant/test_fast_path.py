"""torch's transformer encoders never compute with float weights of layers that are quantized, searched or packed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos import SLB, SimQAT, quantize_weights
from tests.helpers import relative_rms

PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()


class Encoder(nn.Module):
    """`[B, T, 8] -> [B, T, 3]`; in eval mode torch turns a padding mask into nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(8, 16)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.enc(self.inp(x), src_key_padding_mask=mask))


class Whole(nn.Module):
    """Encoder and decoder, GELU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Transformer(8, 2, 1, 1, 16, 0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(x, x, src_key_padding_mask=mask)


class Alone(nn.TransformerEncoderLayer):
    """The network is a layer of torch itself."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, src_key_padding_mask=mask)


NETS = {"encoder": Encoder, "whole": Whole, "alone": Alone}
ALGORITHMS = {
    "simqat": lambda: SimQAT(weight="int4@channel"),
    "slb": lambda: SLB(weight="2bit@channel", total_steps=1),
}


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def answers(net: nn.Module, grad: bool) -> list[Tensor]:
    """Without and with a padding mask, of tokens that are real; the fast path is taken without gradients only."""
    with torch.set_grad_enabled(grad):
        return [net(tokens()).detach().clone(), net(tokens(), PADDING)[~PADDING].detach()]


def takes_no_fast_path(net: nn.Module) -> bool:
    pairs = zip(answers(net, grad=False), answers(net, grad=True), strict=True)
    return all(relative_rms(got, want) < 1e-3 for got, want in pairs)


def prepared(name: str, algorithm: str):
    net, algo = NETS[name](), ALGORITHMS[algorithm]()
    net = algo.apply(net.eval(), tokens())
    net.train()(tokens()).square().sum().backward()
    algo.step()
    return net.eval(), algo


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NETS)
def test_a_prepared_encoder_infers_what_it_trains(name, algorithm, tmp_path):
    net, _ = prepared(name, algorithm)
    assert takes_no_fast_path(net)
    assert takes_no_fast_path(copy.deepcopy(net)) and takes_no_fast_path(pickle.loads(pickle.dumps(net)))
    again = gs_algos.load(gs_algos.save(net, tmp_path), NETS[name]).eval()
    assert all(map(torch.equal, answers(again, grad=False), answers(net, grad=False)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NETS)
def test_a_converted_encoder_bears_a_padding_mask(name, algorithm, tmp_path):
    net, algo = prepared(name, algorithm)
    want = answers(net, grad=False)
    net = algo.convert(net)
    assert all(relative_rms(got, w) < 1e-3 for got, w in zip(answers(net, grad=False), want, strict=True))
    again = gs_algos.load(gs_algos.save(net, tmp_path), NETS[name]).eval()
    assert all(map(torch.equal, answers(again, grad=False), answers(net, grad=False)))


@pytest.mark.parametrize("name", NETS)
def test_a_packed_encoder_runs_its_packed_layers(name, tmp_path):
    net = quantize_weights(NETS[name]().eval(), "int8@channel")
    assert takes_no_fast_path(net)
    again = gs_algos.load(gs_algos.save(net, tmp_path), NETS[name]).eval()
    assert all(map(torch.equal, answers(again, grad=False), answers(net, grad=False)))


def test_an_encoder_that_stays_float_keeps_its_fast_path():
    net = SimQAT(act=None, rules=[("re:enc.*", None)]).apply(Encoder(), tokens())
    assert net.enc.use_nested_tensor and net.enc.layers[0].activation_relu_or_gelu == 1


def test_a_refused_apply_leaves_the_fast_path_as_it_was():
    net = Encoder()
    with pytest.raises(ValueError, match="finite"):
        SimQAT().apply(net, tokens() / 0)
    assert net.enc.use_nested_tensor and net.enc.layers[0].activation_relu_or_gelu == 1
