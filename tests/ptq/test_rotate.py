"""Rotate: networks compute the same in another basis, in which outliers of single channels are spread over all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.core.compare import relative_error
from gs_algos.ptq.blocks import find_blocks, first_tensor
from gs_algos.ptq.ptq import PTQ
from gs_algos.ptq.streams import ActivationStore, Streams
from gs_algos.ptq.transforms.residual import find_residual, is_linear, norm_kind
from gs_algos.ptq.transforms.rotate import rotate
from gs_algos.quant.rotation import Rotation, checked_rotations, rotations_of
from gs_kernels import UnsupportedError, hadamard_matrix
from tests.helpers import Untouched
from tests.nets.language_models import logits, tiny_llama
from tests.nets.transformers_models import tiny_language_model

IDS = {"input_ids": torch.arange(1, 17).view(2, 8)}


@torch.no_grad()
def with_gains(model):
    """Norms with gains and biases with values, as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@torch.no_grad()
def outputs(model, inputs=IDS):
    return model(**inputs)[0]


def tiny_vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3)
    return transformers.ViTForImageClassification(config).eval()


def gemma(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.GemmaConfig(vocab_size=99, intermediate_size=40, head_dim=8, initializer_range=0.3, **sizes)
    return transformers.GemmaForCausalLM(config).eval()


IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
NETWORKS = {
    "llama": (lambda: tiny_llama(tied=False), IDS),
    "llama with a tied head": (tiny_llama, IDS),
    "qwen3": (lambda: tiny_language_model("Qwen3Config"), IDS),
    "gemma": (gemma, IDS),
    "gpt2": (lambda: tiny_language_model("GPT2Config"), IDS),
    "bloom": (lambda: tiny_language_model("BloomConfig"), IDS),
    "opt": (lambda: tiny_language_model("OPTConfig"), IDS),
    "vit": (tiny_vit, IMAGES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same(name):
    make, inputs = NETWORKS[name]
    model = with_gains(make())
    inputs = {"input_ids": inputs["input_ids"] % 31 + 1} if "llama" in name else inputs
    want, before = outputs(model, inputs), copy.deepcopy(model.state_dict())
    rotate(model, inputs)
    assert relative_error(outputs(model, inputs), want) <= 1e-5
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    linears = [key for key in changed if before[key].dim() == 2]
    assert len(linears) >= 2 * 4  # q, k, v or all in one, output, and both sides of the MLP, of two layers


def test_an_untied_network_rotates_only_in_front_of_down_projections_as_it_runs():
    model = with_gains(tiny_llama(tied=False))
    rotate(model, IDS)
    assert list(rotations_of(model)) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert all(
        (model.get_parameter(f"{name}.weight") == 1).all() for name in ("model.norm", "model.layers.1.input_layernorm")
    )


def test_a_tied_head_stays_tied():
    model = with_gains(tiny_llama())
    before = model.lm_head.weight.clone()
    rotate(model, IDS)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, before)
    assert {"model.embed_tokens", "model.norm"} < rotations_of(model).keys()


def test_values_are_rotated_head_by_head():
    """16 channels a head: those of a head of the value projection change in ways that q and k cannot."""
    model = tiny_llama(tied=False)
    norms = [m.weight for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert all((w == 1).all() for w in norms)
    before = model.model.layers[0].self_attn.v_proj.weight.detach().clone()
    rotation = find_residual(model, IDS, "test").rotation
    rotate(model, IDS)
    after = model.model.layers[0].self_attn.v_proj.weight.detach()
    head = torch.block_diag(*[hadamard_matrix(16)] * 2) / 4
    torch.testing.assert_close(after, head @ rotation(before), rtol=1e-4, atol=1e-6)


def test_a_rotation_that_keeps_the_mean_passes_through_a_layer_norm():
    x = torch.randn(5, 36, generator=torch.Generator().manual_seed(0)) + 3
    rotation = Rotation.drawn(36, keeps_mean=True)
    torch.testing.assert_close(rotation(torch.ones(1, 36)), torch.ones(1, 36))
    norm = nn.LayerNorm(36)
    with torch.no_grad():
        torch.testing.assert_close(norm(rotation(x)), rotation(norm(x)))
    torch.testing.assert_close(rotation.back(rotation(x)), x)
    assert norm_kind(norm, 36) == (0.0, True) and norm_kind(nn.RMSNorm(36), 36) == (0.0, False)
    batch_norm = nn.BatchNorm1d(36).eval()
    batch_norm.running_var.copy_(torch.linspace(0.5, 2, 36))
    assert norm_kind(batch_norm, 36) is None


class Deep(nn.Module):
    """Two residual layers of `width` channels, behind norms."""

    def __init__(self, width: int = 32, norm=nn.RMSNorm, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.skip = nn.Linear(8, width), skip
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(torch.nn.functional.silu(up(norm(x))))
        y = self.head(self.norms[2](x))
        return y + x[..., :4] if self.skip else y


ROWS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "model, words",
    [
        (Deep(skip=True), "something else than the norms and linears that were found reads or writes the residual"),
        (Deep(norm=lambda width: nn.Identity()), "needs norms with a gain in front of the layers"),
        (Deep(width=10), "the order of a Hadamard matrix divides, 4 or more, got 10 channels"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "needs norms with a gain"),
    ],
)
def test_what_cannot_be_rotated_is_refused_and_stays_as_it_was(model, words):
    model = with_gains(model.eval())
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=words):
        PTQ(weight="int4@channel", transforms=("rotate",)).apply(model, ROWS)
    assert untouched and not rotations_of(model)


@pytest.mark.parametrize("name", ["Gemma2Config", "MixtralConfig"])
def test_language_models_with_other_readers_or_writers_are_refused_with_the_module(name):
    with pytest.raises(ValueError, match=r"rotate needs .*, got model\.layers\.0\.post_attention_layernorm"):
        rotate(tiny_language_model(name), IDS)


def test_static_activations_are_refused():
    with pytest.raises(
        ValueError, match="rotate needs activations that are float or 'int8@token', got act='int8@tensor'"
    ):
        PTQ(weight="int4@channel", act="int8@tensor", transforms=("rotate",))


@torch.no_grad()
def with_outliers(ratio: float):
    """Some columns of weights are `ratio` times as large as others, and what they meet as much smaller."""
    model = with_gains(Deep(width=64)).eval()
    for norm, reader in zip(model.norms, (*model.up, model.head), strict=True):
        norm.weight[3:5] /= ratio
        reader.weight[:, 3:5] *= ratio
    return model


@pytest.mark.parametrize(
    "ratio, options",
    [
        (20.0, {"weight": "int4@channel"}),
        (20.0, {"weight": "int4@channel", "act": "int8@token"}),
        (1 / 100.0, {"weight": "int8@channel", "act": "int8@token"}),
    ],
)
def test_outliers_of_weights_and_of_activations_do_less_harm(ratio, options):
    want, errors = with_outliers(ratio)(ROWS).detach(), {}
    for transforms in ((), ("rotate",)):
        model = PTQ(**options, rounding="nearest", transforms=transforms).apply(with_outliers(ratio), ROWS)
        with torch.no_grad():
            errors[transforms] = relative_error(model(ROWS), want)
    assert errors["rotate",] < 0.6 * errors[()]


def test_a_calibrated_network_is_packed_saved_and_loaded_with_its_rotations(tmp_path):
    model, batches = with_gains(tiny_llama()), [{"input_ids": torch.randint(1, 31, (2, 8))} for _ in range(4)]
    algo = PTQ(weight="int4@group:16", act="int8@token", transforms=("rotate",))
    assert "rotate: 64 channels in blocks of 64 rotated behind model.embed_tokens" in str(algo.plan(model, batches[0]))
    model = algo.apply(model, batches[0])
    gs_algos.save(model, tmp_path / "prepared")
    prepared = gs_algos.load(tmp_path / "prepared", tiny_llama)
    assert torch.equal(logits(prepared), logits(model)) and rotations_of(prepared) == rotations_of(model)
    algo.calibrate(model, batches)
    model = algo.convert(model)
    want = logits(model)
    gs_algos.save(model, tmp_path / "packed")
    assert torch.equal(logits(gs_algos.load(tmp_path / "packed", tiny_llama)), want)
    model.save_pretrained(tmp_path / "folder")
    loaded = type(model).from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(logits(loaded), want)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again").eval()), want)


def test_the_stream_of_calibration_is_rotated_once():
    """In OPT it is rotated in front of the first block, whose input is stored and given to it again."""
    model = with_gains(tiny_language_model("OPTConfig", num_hidden_layers=3))
    rotate(model, IDS)
    sites = [key for key, module in model.named_modules() if is_linear(module)]
    blocks, given = find_blocks(model, sites, IDS), []
    assert len(blocks) == 3
    last = model.get_submodule(blocks[-1].name)
    handle = last.register_forward_hook(lambda module, args, output: given.append(first_tensor(output)))
    outputs(model)
    with ActivationStore(2**20) as store:
        streams = Streams(model, [IDS], blocks, store, False, "test")
        for block in blocks:
            streams.advance(0, streams.run_block(block, 0, streams.quantized), floats=False)
        handle.remove()
        torch.testing.assert_close(streams.quantized[0], given[0])


def test_onnx_refuses_a_network_that_rotates_as_it_runs(tmp_path):
    pytest.importorskip("onnxscript")
    algo = PTQ(weight="int4@channel", rounding="nearest", transforms=("rotate",))
    model = algo.convert(algo.apply(Deep().eval(), ROWS))
    with pytest.raises(UnsupportedError, match=r"ONNX has no rotation, got down\.0 and 1 more modules"):
        gs_algos.export_onnx(model, ROWS, tmp_path / "net.onnx")


@pytest.mark.parametrize("data", [[], {"a": {"input": {"block": 6}}}, {"a": {"inside": {"block": 4}}}, {"a": 3}])
def test_damaged_rotations_are_refused(data):
    with pytest.raises(ValueError, match="rotations must map modules to what they rotate"):
        checked_rotations(data, "load")
