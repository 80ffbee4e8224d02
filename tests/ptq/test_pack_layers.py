"""quantize_weights packs every kind of layer or says why not, and its dry run says the same."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import gs_algos
from gs_algos import PackedConv, PackedLinear, SimQAT, plan_weights, quantize_weights
from gs_algos.core.algorithm import history
from gs_algos.export.onnx import onnx_model
from gs_algos.ptq import weights as weights_module
from gs_algos.ptq.weights import summary
from gs_algos.quant.packed import module as packed_module
from gs_algos.quant.packed.linear import PackedConv1D
from gs_algos.quant.packed.module import Packed
from tests.helpers import relative_rms, same_bits


class Convs(nn.Module):
    """`[B, 3, 8, 8] -> [B, 5]`: convolutions of one to three axes, strided, dilated, grouped and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, bias=False)
        self.point, self.row = nn.Conv2d(8, 16, 1), nn.Conv1d(16, 16, 3, groups=4)
        self.cube, self.head = nn.Conv3d(16, 8, (1, 2, 2)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depthwise(self.stem(x)).relu())
        x = x + self.row(F.pad(x.flatten(2), (1, 1))).view_as(x)
        return self.head(self.cube(x.unsqueeze(2)).mean((2, 3, 4)))


CONVS = ("stem", "depthwise", "point", "row", "cube")


def convs() -> Any:
    torch.manual_seed(0)
    return Convs().eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def reasons(model: nn.Module) -> dict[str, str]:
    return {row["site"]: row["reason"] for row in history(model)[-1]["plan"] if row["action"] == "keep"}


class Wrapped(nn.Module):
    """`first`, between two linears."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.a, self.first, self.b = nn.Linear(8, 8), first, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.first(self.a(x)))


def rows() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", ["int8@channel", "int8@tensor", "int8@channel:asym"])
def test_every_convolution_is_packed_and_computes_nearly_the_same(weights: str):
    model = quantize_weights(convs(), weights)
    assert all(isinstance(model.get_submodule(name), PackedConv) for name in CONVS)
    assert relative_rms(model(picture()), convs()(picture())) < 0.05
    weight = model.depthwise.weight  # type: ignore[union-attr]
    assert weight.shape == (8, 1, 3, 3) and relative_rms(weight, convs().depthwise.weight) < 0.02
    assert not [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("scheme", ["int4@group:4", "int1@channel", "int2@group:3:asym"])
def test_packed_convolutions_of_few_bits_multiply_with_the_weight_that_they_show(scheme: str):
    model: Any = convs()
    quantize_weights(model, "int8@channel", rules=[("stem", "int4@group:9"), ("row", scheme)])
    again = convs()
    with torch.no_grad():
        for name in (*CONVS, "head"):
            again.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
        assert relative_rms(model(picture()), again(picture())) < 1e-5


def test_a_group_that_divides_no_filter_is_refused_with_a_rule_to_paste():
    words = r"27 weights of a filter of stem, got int4@group:8.*3 such.*use channel"
    with pytest.raises(ValueError, match=words) as said:
        quantize_weights(convs(), "int4@group:8")
    rule = eval(str(said.value).partition("rules=")[2], {})
    model: Any = quantize_weights(convs(), "int4@group:8", rules=rule)
    assert (model.stem.group_size, model.point.group_size) == (27, 8)


@pytest.mark.parametrize("options", [{}, {"rules": [("stem", "int4@group:9:mse"), ("row", None)]}])
def test_the_dry_run_has_the_rows_and_the_bytes_of_the_call(options: dict[str, Any]):
    model = convs()
    plan = plan_weights(model, "int8@channel", **options)
    assert not history(model) and type(model.stem) is nn.Conv2d
    quantize_weights(model, "int8@channel", **options)
    assert [row.to_dict() for row in plan.rows] == history(model)[0]["plan"]
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.totals is not None
    assert plan.totals.after == floats + sum(m.nbytes for m in model.modules() if isinstance(m, Packed))


def test_a_model_without_data_can_be_planned():
    with torch.device("meta"):
        model = Convs()
    plan = plan_weights(model, "int4@channel")
    assert plan.acted() == plan.rows and plan.totals == plan_weights(convs(), "int4@channel").totals


def test_a_network_of_convolutions_is_saved_and_loaded_exactly(tmp_path: Path):
    model = quantize_weights(convs(), "int8@channel", rules=[("stem", "int4@group:9:asym"), ("cube", "int2@group:4")])
    loaded = gs_algos.load(gs_algos.save(model, tmp_path), Convs).eval()
    assert same_bits(loaded(picture()), model(picture())) and history(loaded) == history(model)
    shapes = [line.split()[1] for line in summary(model).splitlines()[2:-1]]
    assert shapes == ["8x3x3x3", "8x1x3x3", "16x8x1x1", "16x4x3", "8x16x1x2x2", "5x8"]


def test_packed_layers_compute_the_same_in_the_layout_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def build() -> nn.Module:
        return nn.ModuleDict({"convs": convs(), "gpt": gpt2_block()}).eval()

    model = quantize_weights(build(), "int4@channel", rules=[("convs.cube", "int2@group:4")])
    gs_algos.save(model, tmp_path)
    monkeypatch.setattr(packed_module, "KERNEL_DEVICES", ("cpu",))
    planar: Any = gs_algos.load(tmp_path, build)
    assert planar["convs"].stem.codes.dtype == torch.int16
    assert same_bits(planar["gpt"].first.weight, model["gpt"].first.weight)
    assert all(
        same_bits(planar["convs"].get_submodule(n).weight, model["convs"].get_submodule(n).weight) for n in CONVS
    )
    assert relative_rms(planar["convs"](picture()), model["convs"](picture())) < 1e-5
    assert relative_rms(planar["gpt"](rows()), model["gpt"](rows())) < 1e-5


def test_copies_pickles_casts_and_state_dicts_of_packed_convolutions_hold():
    model = quantize_weights(convs(), "int8@channel")
    x, file = picture(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = quantize_weights(Convs().eval(), "int8@channel")
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), other):
        assert same_bits(twin(x), model(x))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative_rms(half(x.bfloat16()).float(), model(x)) < 0.05


def test_packed_convolutions_are_exported_and_traced_whole():
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 2), nn.Unflatten(2, (1, 1, 5)), nn.Conv3d(4, 2, (1, 1, 2)))
    model = quantize_weights(net.eval(), "int8@channel", rules=[("1", "int4@group:4")])
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_rms(exported(x), model(x)) < 1e-6 and relative_rms(compiled(x), model(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_other_float_types_keep_theirs(dtype: torch.dtype):
    model: Any = quantize_weights(convs().to(dtype), "int8@channel")
    y = model(picture().to(dtype))
    assert y.dtype == model.head.weight.dtype == model.stem.weight.dtype == dtype
    assert relative_rms(y.float(), convs()(picture())) < 0.08


def gpt2_block() -> Any:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return Wrapped(Conv1D(8, 8)).eval()


def test_conv1d_of_transformers_is_packed_as_the_linear_that_it_is(tmp_path: Path):
    model, x = quantize_weights(gpt2_block(), "int8@channel"), rows()
    layer, float_layer = model.first, gpt2_block().first
    assert isinstance(layer, PackedConv1D) and history(model)[-1]["plan"][1]["kind"] == "Conv1D"
    assert (layer.nf, layer.nx, layer.weight.dtype, layer.weight.shape) == (8, 8, torch.float32, (8, 8))
    assert relative_rms(layer.weight, float_layer.weight) < 0.01
    with torch.no_grad():
        want = torch.addmm(layer.bias, x, layer.weight)  # type: ignore[arg-type]
        assert relative_rms(layer(x), want) < 1e-5
    loaded = gs_algos.load(gs_algos.save(model, tmp_path), gpt2_block)
    assert same_bits(loaded(x), model(x))


def test_conv1d_is_exported_as_a_linear_where_onnx_has_no_packed_form_of_it():
    model = quantize_weights(gpt2_block(), "int4@group:4")
    assert relative_rms(onnx_model(model)(rows()), model(rows())) < 1e-6


def test_a_subclass_that_only_constructs_itself_is_packed_and_its_attributes_stay():
    class Scaled(nn.Linear):
        """A plain linear with an initialization of its own."""

        def __init__(self, n: int) -> None:
            super().__init__(n, n)
            self.note = "mine"

        def reset_parameters(self) -> None:
            nn.init.orthogonal_(self.weight)
            nn.init.zeros_(self.bias)

    model: Any = quantize_weights(Wrapped(Scaled(8)), "int8@channel")
    assert isinstance(model.first, PackedLinear) and model.first.note == "mine"
    conv: Any = quantize_weights(nn.Sequential(nn.Conv2d(2, 2, 1)), "int8@channel")[0]
    assert (conv.padding_mode, conv.transposed, conv.output_padding) == ("zeros", False, (0, 0))


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnCode(nn.Linear):
    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


def more_parameters() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.gain = nn.Parameter(torch.ones(8))
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


def with_state_hook() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_state_dict_post_hook(lambda module, state, prefix, meta: state.pop(prefix + "weight"))
    return layer


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def of_its_own_bias() -> nn.Module:
    layer = nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    return layer


def buffered() -> nn.Module:
    layer = nn.Linear(8, 8)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


KEPT = {
    "a forward": (lambda: OwnForward(8, 8), "OwnForward has a forward of its own"),
    "code": (lambda: OwnCode(8, 8), "OwnCode has code of its own: doubled"),
    "parameters": (more_parameters, "Linear has more than a weight and a bias"),
    "replaced forward": (patched, "its forward was replaced on the object"),
    "state hooks": (with_state_hook, "has hooks on its state_dict, which is another one once packed"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "comes from WeightNorm"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "comes from SpectralNorm"),
    "parametrization": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "comes from WeightNorm"
    ),
    "pruned weights": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "comes from L1Unstructured"),
    "a bias that is computed": (lambda: of_its_own_bias(), "ParametrizedLinear has code of its own: bias"),
    "a weight in a buffer": (lambda: buffered(), "comes from a buffer"),
    "a double weight": (lambda: nn.Linear(8, 8, dtype=torch.float64), "its weight is float64; only float32"),
    "a complex weight": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its weight is complex64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", KEPT)
def test_a_layer_that_does_more_than_its_kind_is_a_line_with_the_reason(name: str):
    build, words = KEPT[name]
    torch.manual_seed(0)
    layer = build()
    model = quantize_weights(Wrapped(layer), "int8@channel")
    assert model.first is layer and words in reasons(model)["first"]
    assert isinstance(model.a, PackedLinear) and isinstance(model.b, PackedLinear)


def test_a_model_whose_layers_are_all_kept_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"got 2 layers that are all kept: OwnForward has a forward of its own \(2\)"):
        quantize_weights(nn.Sequential(OwnForward(4, 4), OwnForward(4, 4)), "int8@channel")
    words = r"got Sequential without.*what it has is multiplied inside nn\.GRU, not by a layer \(2\)"
    with pytest.raises(ValueError, match=words):
        quantize_weights(nn.Sequential(nn.GRU(8, 8)), "int8@channel")
    with pytest.raises(ValueError, match="is the model itself, which cannot be replaced in place"):
        quantize_weights(nn.Linear(4, 4), "int8@channel")
    with pytest.raises(ValueError, match=r"must know its shape, got LazyLinear at 0; run the model once"):
        quantize_weights(nn.Sequential(nn.LazyLinear(4)), "int8@channel")
    with pytest.raises(ValueError, match=r"must know its shape, got LazyBatchNorm1d at 1"):
        plan_weights(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), "int8@channel")


def test_matrices_outside_of_layers_are_lines_too():
    model = quantize_weights(Wrapped(nn.GRU(8, 8)), "int8@channel", rules=[("first", None)])
    assert reasons(model)["first.weight_ih_l0"] == "is multiplied inside nn.GRU, not by a layer"


def tied_three_ways() -> Any:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 8)})
    net["b"].weight = net["a"].weight  # one parameter in two layers
    net["c"].weight.data = net["a"].weight.data  # two parameters, the same numbers in memory
    net["again"] = net["d"]  # one layer at two names
    return net


def test_weights_tied_in_any_way_are_packed_once(tmp_path: Path):
    net = quantize_weights(tied_three_ways(), "int8@channel")
    assert [row["settings"]["names"] for row in history(net)[0]["plan"]] == [["a", "b", "c"], ["d"]]
    assert net["b"].packed.codes is net["a"].codes and net["c"].packed.codes is net["a"].codes
    assert net["again"] is net["d"]
    loaded = gs_algos.load(gs_algos.save(net, tmp_path), tied_three_ways)
    assert all(same_bits(loaded[name](rows()), net[name](rows())) for name in net)


def test_convolutions_that_share_a_filter_share_the_packed_one():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2))
    net[1].weight = net[0].weight
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = net(x)
    quantize_weights(net, "int8@channel")
    assert net[1].tied and relative_rms(net(x), want) < 0.02
    twin = pickle.loads(pickle.dumps(net))
    assert twin[1].packed.codes is twin[0].codes and same_bits(twin(x), net(x))


def test_a_weight_that_another_module_uses_too_stays_float_with_a_line():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.matrix = self.fc.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.fc(x)) @ self.matrix

    net = quantize_weights(nn.Sequential(Both()), "int8@channel")
    assert reasons(net) == {"0.fc": "its weight is also used by 0, which is no such layer"}
    assert net[0].fc.weight is net[0].matrix


def test_hooks_of_every_kind_act_on_packed_layers():
    model, seen = Wrapped(nn.Conv1d(3, 3, 1)).eval(), []
    model.first.register_forward_pre_hook(lambda m, args: seen.append("in"))
    model.b.register_forward_pre_hook(lambda m, args, kw: seen.append("in"), with_kwargs=True)
    handle = model.a.register_forward_hook(lambda m, args, y: seen.append("out") or 10 * y, always_call=True)
    model.b.register_full_backward_hook(lambda m, dx, dy: seen.append("back"))
    want = model(rows()).detach()
    seen.clear()
    quantize_weights(model, "int8@channel")
    y = model(rows().requires_grad_())
    y.sum().backward()
    assert relative_rms(y, want) < 0.02 and seen == ["out", "in", "in", "back"]
    handle.remove()
    assert relative_rms(model(rows()), want) > 0.1


def test_packing_in_inference_mode_leaves_a_model_that_gradients_pass():
    with torch.inference_mode():
        model = quantize_weights(convs(), "int8@channel")
    x = picture().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and not any(t.is_inference() for t in model.state_dict().values())


def test_the_mode_of_the_model_is_that_of_its_packed_layers():
    model = quantize_weights(convs().train(), "int8@channel")
    assert all(module.training for module in model.modules())


def test_a_model_in_training_by_an_algorithm_is_refused():
    model = SimQAT().apply(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), rows())
    for call in (quantize_weights, plan_weights):
        with pytest.raises(RuntimeError, match="must be trained, got one that simqat prepared; convert it first"):
            call(model, "int8@channel")


@pytest.mark.parametrize("device", ["cuda:99", "xyz", "meta"])
def test_a_device_that_cannot_round_is_refused_before_anything_is_touched(device: str):
    model = convs()
    with pytest.raises(ValueError, match=rf"quantize_weights: device must .*, got '{device}'"):
        quantize_weights(model, "int8@channel", device=device)
    assert type(model.stem) is nn.Conv2d and not history(model)


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    original, calls = weights_module.rounded, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args)

    monkeypatch.setattr(weights_module, "rounded", failing)


def test_a_failure_at_the_first_layer_leaves_the_model_float(monkeypatch: pytest.MonkeyPatch):
    model = convs()
    fail_at(monkeypatch, 1, MemoryError("no room"))
    with pytest.raises(MemoryError):
        quantize_weights(model, "int8@channel")
    assert not history(model) and not any(isinstance(m, Packed) for m in model.modules())


def test_a_failure_in_the_middle_says_which_layers_are_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = convs()
    fail_at(monkeypatch, 3, MemoryError("no room"))
    words = (
        r"got MemoryError at point: no room; 2 of 6 layers are packed already \(stem, depthwise\): build the model anew"
    )
    with pytest.raises(RuntimeError, match=words):
        quantize_weights(model, "int8@channel")
    monkeypatch.undo()
    assert reasons(model) == dict.fromkeys(("point", "row", "cube", "head"), "packing stopped before it")
    with pytest.raises(RuntimeError, match="must not be packed yet"):
        quantize_weights(model, "int8@channel")
    loaded = gs_algos.load(gs_algos.save(model, tmp_path), Convs).eval()
    assert same_bits(loaded(picture()), model(picture()))


def test_an_interrupt_in_the_middle_stays_one_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model = convs()
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        quantize_weights(model, "int8@channel")
    assert "1 of 6 layers are packed already" in caplog.text and len(reasons(model)) == 5
