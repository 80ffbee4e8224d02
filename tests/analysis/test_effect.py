"""What compression did to a network: its size, its work, its time, and its outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gs_algos
from gs_algos.analysis.effect import effect
from gs_algos.analysis.operations import count_operations
from gs_algos.analysis.quality import wilson
from gs_algos.core.compare import relative_error
from gs_algos.llm.perplexity import perplexity
from tests.nets.convolutional import SmallConvNet, images, mlp, train
from tests.nets.language_models import tiny_llama

SECONDS = 0.0  # the least number of calls
CONV_MACS = 144 * 6 * 9 + 36 * 8 * (6 * 9 + 8 * 9 + 6) + 8 * 4  # of SmallConvNet


def float_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet().eval()


def labelled(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(8, seed=s), torch.arange(8) % 4) for s in range(count)]


def packed(net: nn.Module, scheme: str = "int4@channel") -> nn.Module:
    return gs_algos.quantize_weights(copy.deepcopy(net), scheme)


def converted(net: nn.Module, weight: str) -> nn.Module:
    algo = gs_algos.PTQ(weight=weight, act="int8@tensor")
    net = algo.apply(copy.deepcopy(net), images(2))
    algo.calibrate(net, [images(8)])
    return algo.convert(net, images(2))


def test_a_network_beside_itself_has_no_effect():
    net = float_net()
    found = effect(net, net, images(4), labelled(), seconds=SECONDS)
    assert (found.samples, found.differing, found.divergence, found.error) == (24, 0, 0.0, 0.0)
    assert found.before.quality == found.after.quality and found.before.nbytes == found.after.nbytes
    assert found.notes == ()


def test_outputs_are_compared_over_all_batches():
    net = float_net()
    other = packed(net, "int2@channel")
    x = torch.cat([x for x, _ in labelled()])
    with torch.no_grad():
        p, q = net(x), other(x)
    found = effect(net, other, images(4), labelled(), seconds=SECONDS)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    assert found.error == pytest.approx(relative_error(q, p), rel=1e-5)
    assert found.differing == int((p.argmax(1) != q.argmax(1)).sum())
    assert found.divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-3)


def test_accuracy_is_that_of_the_labels_with_the_interval_of_wilson():
    net, data = float_net(), labelled()
    quality = effect(net, packed(net), images(4), data, seconds=SECONDS).before.quality
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    assert quality is not None and (quality.name, quality.count) == ("accuracy", 24)
    assert quality.value == right / 24
    assert (quality.low, quality.high) == wilson(right, 24)


def test_the_interval_of_wilson():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0


def test_labels_below_zero_do_not_count():
    x, y = images(8), torch.tensor([0, 1, 2, 3, -100, -100, -100, -100])
    quality = effect(float_net(), float_net(), x, [(x, y)], seconds=SECONDS).after.quality
    assert quality is not None and quality.count == 4


def test_macs_are_those_of_float_and_packed_layers_alike():
    net = float_net()
    found = effect(net, packed(net), images(4), seconds=SECONDS)
    assert found.before.macs == found.after.macs == CONV_MACS
    assert found.before.bops == 32 * 32 * CONV_MACS
    assert found.after.bops == 4 * 32 * CONV_MACS


@pytest.mark.parametrize("bits", [3, 8])
def test_bops_of_integer_layers_have_the_bits_of_both_schemes(bits):
    net = float_net()
    found = effect(net, converted(net, f"int{bits}@channel"), images(4), seconds=SECONDS)
    assert (found.after.macs, found.after.bops) == (CONV_MACS, bits * 8 * CONV_MACS)


def test_a_trained_network_is_compared_with_the_float_one():
    net = float_net()
    algo = gs_algos.SimQAT(weight="int4@channel")
    trained = algo.apply(copy.deepcopy(net), images(2))
    train(trained, algo, 1)
    found = effect(net, algo.convert(trained, images(2)), images(4), labelled(), seconds=SECONDS)
    assert found.after.bops == 4 * 8 * CONV_MACS and found.after.nbytes < found.before.nbytes


def test_a_cut_network_has_fewer_numbers_and_macs():
    net = float_net()
    algo = gs_algos.Prune(rate=0.5)
    cut = algo.apply(copy.deepcopy(net), images(2))
    train(cut, algo, 1)
    found = effect(net, algo.convert(cut, images(2)), images(4), seconds=SECONDS)
    assert found.after.numbers < found.before.numbers and found.after.macs < found.before.macs


def test_packed_weights_count_as_many_numbers_as_the_float_ones():
    net = mlp()
    found = effect(net, packed(net), torch.ones(2, 16), seconds=SECONDS)
    assert found.before.numbers == found.after.numbers == sum(p.numel() for p in net.parameters())
    assert found.before.nbytes == 4 * found.before.numbers


def test_bytes_on_disk_are_those_that_save_writes(tmp_path):
    net = packed(mlp())
    gs_algos.save(net, tmp_path / "saved")
    found = effect(mlp(), net, torch.ones(2, 16), seconds=SECONDS)
    assert found.after.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())


def test_times_are_of_one_sample_and_of_those_of_the_inputs():
    found = effect(mlp(), mlp(), torch.ones(3, 16), seconds=SECONDS)
    assert list(found.before.ms) == list(found.after.peak_bytes) == [1, 3]
    timing = found.after.ms[3]
    assert 0 < timing.p20 <= timing.p50 <= timing.p80 and timing.calls >= 5


def test_the_peak_of_a_forward_is_beside_the_network():
    found = effect(nn.Linear(64, 256), nn.Linear(64, 256), torch.ones(8, 64), batches=[8], seconds=SECONDS)
    assert found.before.peak_bytes == {8: 4 * 8 * 256}


class FixedBatch(nn.Module):
    """Takes two samples, no more and no less."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 16) * 2


def test_a_batch_that_a_network_refuses_is_left_out_and_said():
    found = effect(nn.Identity(), FixedBatch(), torch.ones(2, 16), seconds=SECONDS)
    assert list(found.before.ms) == [2]
    assert any(note.startswith("a batch of 1 was not timed: after") for note in found.notes)


def test_perplexity_is_that_of_the_windows():
    model = tiny_llama()
    ids = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    found = effect(model, packed(model, "int8@channel"), ids[:1], [ids[:2], ids[2:]], seconds=SECONDS)
    quality = found.before.quality
    assert quality is not None and (quality.name, quality.count) == ("perplexity", 44)
    assert quality.value == pytest.approx(perplexity(model, ids.flatten(), 12).value, rel=1e-5)
    assert quality.low < quality.value < quality.high
    assert found.samples == 48


def test_padding_counts_nowhere():
    model = tiny_llama()
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = effect(model, model, ids, [{"input_ids": ids, "attention_mask": mask}], seconds=SECONDS)
    assert found.samples == 20 and found.before.quality is not None
    assert found.before.quality.count == 7 + 11


@dataclass
class Two:
    features: list[int]
    scores: Tensor


class TwoOutputs(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(16, 4), kind

    def forward(self, x: Tensor) -> object:
        y = self.fc(x)
        return self.kind([1], y) if self.kind is Two else {"y": y, "x": x} if self.kind is dict else (y, x)


@pytest.mark.parametrize("kind", [tuple, dict, Two])
def test_of_two_outputs_the_first_float_tensor_is_compared(kind):
    net = TwoOutputs(kind)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc.weight *= 1.5
        other.fc.bias *= 1.5
    found = effect(net, other, torch.ones(2, 16), seconds=SECONDS)
    assert found.error == pytest.approx(0.5, rel=1e-5) and found.samples == 2


def test_without_data_the_inputs_are_compared_and_that_is_said():
    found = effect(mlp(), mlp(), torch.ones(3, 16), seconds=SECONDS)
    assert found.samples == 3 and found.before.quality is None
    assert "no data" in found.notes[0]


def test_data_without_labels_gives_no_quality_and_says_so():
    found = effect(mlp(), mlp(), torch.ones(3, 16), [torch.ones(3, 16)], seconds=SECONDS)
    assert found.before.quality is None and "no labels" in found.notes[0]


def test_outputs_that_are_no_logits_have_an_error_alone():
    net = nn.Linear(16, 1)
    found = effect(net, net, torch.ones(3, 16), seconds=SECONDS)
    assert (found.differing, found.divergence, found.error) == (None, None, 0.0)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :4] * 1
        y[0] = torch.nan
        return y


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] * 1


def test_nan_of_the_compressed_network_is_counted_and_said():
    found = effect(First(), Broken(), torch.ones(3, 16), seconds=SECONDS)
    assert (found.error, found.divergence, found.differing) == (float("inf"), float("inf"), 1)
    assert "after gives NaN or Inf in 1 of 3 rows of its outputs" in found.notes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: effect(Broken(), First(), torch.ones(3, 16)), "the outputs of before must be finite"),
        (lambda: effect(First(), nn.Identity(), torch.ones(3, 16)), r"one shape, got \[3, 4\] and \[3, 16\]"),
        (lambda: effect(First(), First(), ()), "inputs must hold a tensor, got none"),
        (lambda: effect(First(), First(), torch.ones(0, 16)), "one sample at least"),
        (lambda: effect(First(), mlp(), torch.ones(3, 5)), "effect: after: the inputs must run"),
        (lambda: effect(First(), First(), torch.ones(3, 16), batches=[0]), "whole numbers from 1 on, got 0"),
        (lambda: effect(First(), First(), torch.ones(3, 16), torch.ones(3, 16)), "batch by batch"),
        (lambda: effect(First(), First(), torch.ones(3, 16), seconds=-1), "seconds must be 0 or more"),
        (
            lambda: effect(First(), First(), torch.ones(3, 16), [(torch.ones(3, 16), torch.tensor([1, 2, 4]))]),
            "labels must be below the 4 classes",
        ),
    ],
)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_networks_are_left_as_they_were():
    net, other = float_net().train(), packed(float_net()).train()
    effect(net, other, images(4), labelled(), seconds=SECONDS)
    assert net.training and other.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (net, other) for m in n.modules())


def test_the_table_has_both_columns():
    net = float_net()
    text = str(effect(net, packed(net), images(4), labelled(), seconds=SECONDS))
    assert "bytes loaded" in text and "accuracy" in text and "predictions differ" in text


def test_experts_are_counted_for_the_tokens_that_they_get():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 99}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 40}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **moe))
    tokens = 16
    block = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 32 + 2 * 3 * 32 * 40
    attention = 4 * tokens * tokens * 2 * 8
    ids = torch.arange(tokens)[None]
    assert count_operations(model, ids, "test").macs == tokens * (block + 32 * 99) + attention


def test_attention_and_recurrence_are_counted():
    q = torch.ones(2, 3, 5, 8)

    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert count_operations(Attention(), q, "test").macs == 2 * 3 * 5 * 5 * 16
    assert count_operations(nn.LSTM(4, 6), torch.ones(7, 2, 4), "test").macs == 7 * 2 * 4 * 6 * (4 + 6)
