"""PTQ with static activations: a CNN and a ViT from apply to a converted, saved and loaded network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gs_algos
from gs_algos.core.algorithm import history
from gs_algos.ptq.ptq import PTQ
from gs_algos.qat.simqat import SimQAT
from gs_algos.quant.fake_quant.layers import FakeQuantized
from gs_algos.quant.integer.layers import QuantizedConv, QuantizedLinear
from gs_kernels import score_candidates
from tests.helpers import Untouched, relative_rms
from tests.nets.convolutional import SmallConvNet, images


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / 3).softmax(3) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallViT(nn.Module):
    """`[B, 1, 12, 12] -> [B, 4]`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 9, width))
        self.blocks = nn.Sequential(*(Encoder(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


class Functional(nn.Module):
    """Calls its convolution as a function, and one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3) / 3)
        self.norm = nn.BatchNorm2d(4)
        self.twice, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.kernel, padding=1)))
        return self.head(self.twice(F.relu(self.twice(x))).mean((2, 3)))


def smooth(n: int = 32, seed: int = 0) -> torch.Tensor:
    """Images whose pixels depend on each other, as those of photographs do."""
    x = images(n, seed)
    return x + x.roll(1, 2) + x.roll(1, 3)


def net(kind: type[nn.Module] = SmallConvNet) -> nn.Module:
    torch.manual_seed(0)
    made = kind()
    with torch.no_grad():
        for seed in range(5):  # for the statistics of batch norms
            made.train()(smooth(seed=seed))
    return made.eval()


def batches(count: int = 6) -> list[torch.Tensor]:
    return [smooth(seed=seed) for seed in range(count)]


def calibrated(kind: type[nn.Module] = SmallConvNet, **options) -> tuple[PTQ, nn.Module]:
    algo = PTQ(**{"weight": "int4@channel", "act": "int8@tensor", **options})
    model = algo.apply(net(kind), batches()[0])
    algo.calibrate(model, batches())
    return algo, model


@torch.no_grad()
def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


@pytest.mark.parametrize("kind", [SmallConvNet, SmallViT])
@pytest.mark.parametrize(("weight", "most"), [("int8@channel", 0.98), ("int4@channel", 0.6)])
def test_the_output_moves_less_than_that_of_an_untrained_simqat_on_images_not_seen(kind, weight, most):
    x = smooth(128, seed=99)
    want = output(net(kind), x)
    other = SimQAT(weight=weight, act="int8@tensor")
    nearest = other.apply(net(kind), batches()[0])
    other.calibrate(nearest, batches())
    _, ours = calibrated(kind, weight=weight)
    assert relative_rms(output(ours, x), want) < most * relative_rms(output(nearest, x), want)


@pytest.mark.parametrize("weight", ["int8@channel", "int4@channel", "int4@tensor:mse", "uint6@channel:asym"])
def test_a_converted_network_gives_the_bits_of_the_calibrated_one(weight):
    algo, model = calibrated(weight=weight)
    x = smooth(seed=99)
    want = output(model, x)
    model = algo.convert(model)
    assert torch.equal(output(model, x), want)
    assert algo.parity is not None and algo.parity.output_error == 0
    assert type(model.block.conv1) is QuantizedConv and type(model.fc) is QuantizedLinear
    assert "int8 x int8 -> int32" in algo.summary(model)


@pytest.mark.parametrize("kind", [SmallViT, Functional])
def test_other_networks_are_converted_too(kind):
    algo, model = calibrated(kind)
    x = smooth(seed=99)
    want = output(model, x)
    assert relative_rms(output(algo.convert(model), x), want) < 1e-5


def test_codes_and_grids_stay_what_was_found():
    _, model = calibrated()
    layer = model.block.conv1
    quantizer = layer.weight_quantizer
    assert quantizer.fixed and bool((quantizer.scale > 0).all())
    assert torch.equal(quantizer(layer.weight), layer.weight)


def test_batch_norms_are_folded_at_once():
    model = PTQ(weight="int8@channel", act="int8@tensor").apply(net(), batches()[0])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model.stem.bias is not None
    x = smooth(seed=99)
    assert relative_rms(output(model, x), output(net(), x)) < 0.05


def test_biases_take_the_mean_error_of_the_outputs():
    x = torch.cat(batches())
    want = output(net(), x).mean(0)
    moved, fixed = (output(calibrated(weight="int3@channel", bias=bias)[1], x).mean(0) for bias in (True, False))
    assert (moved - want).norm() < (fixed - want).norm()


def test_a_converted_network_is_saved_and_loaded_with_its_bits(tmp_path):
    for kind in (SmallConvNet, Functional):
        algo, model = calibrated(kind)
        model = algo.convert(model)
        gs_algos.save(model, tmp_path / kind.__name__)
        loaded = gs_algos.load(tmp_path / kind.__name__, kind)
        x = smooth(seed=99)
        assert torch.equal(output(loaded, x), output(model, x))
        assert [(entry["algorithm"], entry["stage"]) for entry in history(loaded)] == [("ptq", "converted")]


def test_a_calibrated_network_is_saved_loaded_and_converted_to_the_same_bits(tmp_path):
    algo, model = calibrated()
    gs_algos.save(model, tmp_path / "prepared")
    loaded = gs_algos.load(tmp_path / "prepared", SmallConvNet)
    x = smooth(seed=99)
    assert torch.equal(output(loaded, x), output(model, x))
    assert torch.equal(output(PTQ.resume(loaded).convert(loaded, x), x), output(algo.convert(model), x))


def test_a_prepared_network_is_saved_loaded_and_calibrated_to_the_same_bits(tmp_path):
    algo = PTQ(weight="int4@channel", act="int8@tensor")
    gs_algos.save(algo.apply(net(), batches()[0]), tmp_path / "prepared")
    loaded = gs_algos.load(tmp_path / "prepared", SmallConvNet)
    PTQ.resume(loaded).calibrate(loaded, batches())
    x = smooth(seed=99)
    assert torch.equal(output(loaded, x), output(calibrated()[1], x))


def test_a_journal_gives_the_same_bits_again(tmp_path, monkeypatch):
    x = smooth(seed=99)
    found = []
    for _ in range(2):
        algo = PTQ(weight="int4@channel", act="int8@tensor")
        model = algo.apply(net(), batches()[0])
        algo.calibrate(model, batches(), journal=tmp_path)
        found.append(output(model, x))
        monkeypatch.setattr("gs_algos.ptq.block_loop.solve", None)  # not called again
    assert torch.equal(*found)


def test_rules_set_rounding_and_activations_or_leave_a_layer_float():
    rules = [("fc", None), ("block.conv1", {"act": None}), ("stem", {"weight": "int8@channel", "rounding": "nearest"})]
    algo = PTQ(weight="int4@channel", act="int8@tensor", rules=rules)
    plan = {row.site: row for row in algo.plan(net(), batches()[0]).rows}
    assert plan["fc"].action == "keep" and "nearest" in plan["stem"].detail
    model = algo.apply(net(), batches()[0])
    algo.calibrate(model, batches())
    model = algo.convert(model)
    assert type(model.fc) is nn.Linear
    assert model.block.conv1.input_quantizer is None
    assert model.stem.scheme.bits == 8 and model.block.conv2.scheme.bits == 4


def test_a_weight_of_two_modules_stays_float_and_the_plan_says_why():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    algo = PTQ(weight="int4@channel", act="int8@tensor")
    rows = {row.site: row for row in algo.plan(model, x).rows}
    assert rows["0"].reason == "weight is tied to 2.weight" and rows["4"].action != "keep"
    algo.calibrate(algo.apply(model, x), [x, x + 1])
    assert isinstance(model[4], FakeQuantized) and type(model[0]) is nn.Linear


def test_activations_that_are_not_finite_name_the_layer_and_a_second_call_is_refused():
    data = batches()
    data[2][3, 0, 5, 5] = torch.nan
    algo = PTQ(weight="int4@channel", act="int8@tensor")
    model = algo.apply(net(), batches()[0])
    with pytest.raises(ValueError, match="stem: the inputs of calibration must be finite"):
        algo.calibrate(model, data)
    algo.calibrate(model, batches())  # nothing was rounded yet


def test_a_calibration_that_stopped_in_the_middle_is_not_gone_on_with(monkeypatch):
    from gs_algos.ptq import block_loop

    solve, calls = block_loop.solve, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(*args, **options)

    monkeypatch.setattr(block_loop, "solve", interrupted)
    algo = PTQ(weight="int4@channel", act="int8@tensor")
    model = algo.apply(net(), batches()[0])
    with pytest.raises(KeyboardInterrupt):
        algo.calibrate(model, batches())
    assert all(m.weight_quantizer.active for m in model.modules() if isinstance(m, FakeQuantized))
    with pytest.raises(RuntimeError, match="got 2 of 5 that a call which failed has rounded"):
        algo.calibrate(model, batches())


def test_a_refused_apply_leaves_the_model_as_it_was():
    model = net()
    with torch.no_grad():
        model.block.bn2.running_mean[0] = torch.nan
    before = Untouched(model)
    with pytest.raises(ValueError, match=r"block\.conv2\.bias must be finite"):
        PTQ(weight="int4@channel", act="int8@tensor").apply(model, batches()[0])
    assert before


def test_convert_needs_a_calibration_even_to_nearest():
    algo = PTQ(weight="int8@channel", act="int8@tensor", rounding="nearest")
    model = algo.apply(net(), batches()[0])
    with pytest.raises(RuntimeError, match="call calibrate"):
        algo.convert(model)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"embeddings": "int8@channel"}, "embeddings stay float beside static activations"),
        ({"rules": [("fc", {"act": "int8@token"})]}, "got both"),
        ({"act": "int8@tensor:lsq"}, "lsq needs training"),
        ({"ranges": "gradients"}, "ranges must be observed or gradient, got 'gradients'"),
        ({"act": None, "ranges": "gradient"}, "ranges are of static activations, got ranges='gradient' and act=None"),
        ({"act": "int8@channel"}, "one scale per tensor"),
        ({"act": "int8@tesnor"}, "use 'int8@tensor"),
        ({"weight": "int4@channel:lsq"}, "lsq needs training"),
        ({"weight": "int1@channel"}, "2 to 8 bits"),
        ({"rules": [("fc", {"weight": "int1@channel"})]}, "rule fc: weights must have 2 to 8 bits"),
    ],
)
def test_wrong_options_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        PTQ(**{"weight": "int4@channel", "act": "int8@tensor", **options})


def test_widths_that_are_never_packed_are_for_static_activations_alone():
    assert PTQ(weight="int6@channel", act="int6@tensor:mse").config.static
    with pytest.raises(ValueError, match="use int8"):
        PTQ(weight="int6@channel")


def test_a_copy_of_a_calibrated_network_is_converted_apart():
    algo, model = calibrated()
    twin = copy.deepcopy(model)
    x = smooth(seed=99)
    want = output(model, x)
    assert torch.equal(output(PTQ.resume(twin).convert(twin, x), x), want)
    assert torch.equal(output(algo.convert(model), x), want)


def outlying_vit() -> SmallViT:
    torch.manual_seed(0)
    net = SmallViT().eval()
    with torch.no_grad():
        for block in net.blocks:
            for norm, reader in ((block.norm1, block.attention.qkv), (block.norm2, block.up)):
                norm.weight[[2, 9]], norm.bias[[2, 5]] = 25.0, 8.0
                reader.weight[:, [2, 9]] /= 25.0
    return net


def test_equal_ranges_behind_norms_help_static_activations():
    torch.manual_seed(0)
    data = [torch.randn(16, 1, 12, 12) for _ in range(6)]
    errors = []
    for transforms in ((), ("relayernorm",)):
        algo = PTQ(weight="int8@channel", act="int6@tensor", transforms=transforms)
        net = algo.apply(outlying_vit(), data[0])
        algo.calibrate(net, data)
        net = algo.convert(net)
        with torch.no_grad():
            errors.append(relative_rms(net(data[0]), outlying_vit()(data[0])))
    assert errors[1] < 0.5 * errors[0]


def searched(ranges: str, act: str = "int6@tensor") -> tuple[PTQ, nn.Module]:
    algo = PTQ(weight="int8@channel", act=act, ranges=ranges)
    net = algo.apply(outlying_vit(), batches()[0])
    algo.calibrate(net, batches())
    return algo, net


def test_ranges_by_gradient_bring_the_output_of_a_vit_closer_on_images_not_seen():
    x = smooth(64, seed=99)
    want = output(outlying_vit(), x)
    errors = [relative_rms(output(searched(ranges)[1], x), want) for ranges in ("observed", "gradient")]
    assert errors[1] < 0.9 * errors[0]


def test_layers_that_read_one_tensor_get_one_range_and_convert_gives_the_same_bits():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = F.gelu(self.stem(x.flatten(1, 2)))
            return self.head(torch.tanh(self.left(x)) * torch.tanh(self.right(x)))

    torch.manual_seed(0)
    algo = PTQ(weight="int8@channel", act="int3@tensor", ranges="gradient")
    model = algo.apply(Twins().eval(), batches()[0])
    algo.calibrate(model, batches())
    x = smooth(seed=99)
    ranges = [model.get_submodule(name).input_quantizer.range for name in ("left", "right")]
    assert torch.equal(*ranges) and not torch.equal(ranges[0], observed_range(model.left, model, batches()))
    want = output(model, x)
    assert torch.equal(output(algo.convert(model), x), want)


def observed_range(layer: nn.Module, model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for x in data:
        output(model, x)
    handle.remove()
    return torch.stack([-torch.cat(seen).min(), torch.cat(seen).max()])


def test_ranges_by_gradient_that_are_no_better_are_left_as_observed(monkeypatch, caplog):
    def worst(*args, **grid):
        return -score_candidates(*args, **grid)

    monkeypatch.setattr("gs_algos.ptq.act_ranges.score_candidates", worst)
    found, want = (searched(ranges)[1].state_dict() for ranges in ("gradient", "observed"))
    assert "no better than those observed, which stay" in caplog.text
    for key, value in want.items():
        assert torch.equal(found[key], value), key
