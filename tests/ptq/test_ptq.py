"""PTQ from apply to a packed, saved and loaded network."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos.core.algorithm import history
from gs_algos.ptq.layers import Rounded
from gs_algos.ptq.ptq import PTQ
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedLinear


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.relu(self.gate(h)) * self.up(h))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x * 1)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def net(blocks: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(blocks).eval()


def batches(count: int = 6, rows: int = 64, seed: int = 1) -> list[torch.Tensor]:
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(rows, 8, generator=generator) @ mix for _ in range(count)]


def calibrated(model: nn.Module, data, **options) -> tuple[PTQ, nn.Module]:
    algo = PTQ(**{"weight": "int4@group:8", **options})
    model = algo.apply(model, data[0])
    algo.calibrate(model, data)
    return algo, model


def error(model: nn.Module, want: torch.Tensor, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - want).square().mean().sqrt() / want.square().mean().sqrt())


@torch.no_grad()
def test_the_output_moves_less_than_by_rounding_to_nearest_on_data_not_seen():
    x = batches(1, seed=1)[0]
    want = net()(x)
    ends = [("stem", None), ("head", None)]
    nearest = gs_algos.quantize_weights(net(), "int4@group:8", rules=ends)
    _, rounded = calibrated(net(), batches(8, 128), rules=ends)
    assert error(rounded, want, x) < 0.6 * error(nearest, want, x)


@pytest.mark.parametrize("options", [{}, {"correct": 0.0, "bias": False}, {"refine": 0, "order": "group"}])
def test_the_packed_network_gives_the_output_of_the_calibrated_one(options):
    data = batches()
    algo, model = calibrated(net(), data, **options)
    with torch.no_grad():
        want = model(data[0])
        got = algo.convert(model)(data[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(type(model.get_submodule(f"blocks.{i}.up")) is PackedLinear for i in range(3))


def test_the_whole_network_as_one_block_gives_the_same_codes():
    data = batches()
    found = [calibrated(net(), data, blocks=blocks)[1].state_dict() for blocks in ("auto", "none")]
    inside = [key for key in found[0] if key.startswith("blocks.") and key.endswith(".weight")]
    for key in inside:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=0, atol=0, msg=key)


def test_activations_in_memory_or_in_files_give_the_same_codes():
    data = batches()
    algo, model = calibrated(net(), data, budget=0)
    assert algo.report is not None and algo.report.in_memory == 0 and algo.report.on_disk > 0
    for key, value in calibrated(net(), data)[1].state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_a_saved_network_is_loaded_with_the_same_output(tmp_path):
    data = batches()
    algo, model = calibrated(net(), data, act="int8@token")
    model = algo.convert(model)
    gs_algos.save(model, tmp_path / "packed")
    loaded = gs_algos.load(tmp_path / "packed", Net)
    assert type(loaded.blocks[0].up) is DynamicPackedLinear
    with torch.no_grad():
        torch.testing.assert_close(loaded(data[0]), model(data[0]), rtol=0, atol=0)
    assert [entry["algorithm"] for entry in history(loaded)] == ["quantize_weights"]


def test_a_calibrated_network_can_be_saved_loaded_and_converted(tmp_path):
    data = batches()
    _, model = calibrated(net(), data)
    gs_algos.save(model, tmp_path / "prepared")
    loaded = gs_algos.load(tmp_path / "prepared", Net)
    with torch.no_grad():
        want = model(data[0])
        torch.testing.assert_close(loaded(data[0]), want, rtol=0, atol=0)
        packed = PTQ.resume(loaded).convert(loaded, data[0])
        torch.testing.assert_close(packed(data[0]), want, rtol=1e-5, atol=1e-6)


def test_rows_rounded_to_8_bits_as_they_come_cost_little():
    data = batches()
    x = data[0]
    with torch.no_grad():
        want = net()(x)
    errors = [error(calibrated(net(), data, act=act)[1], want, x) for act in (None, "int8@token")]
    assert errors[1] < 1.2 * errors[0]


def test_convolutions_are_rounded_with_their_patches():
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 8, 8).cumsum(3) for _ in range(4)]
    torch.manual_seed(1)
    float_net = Convs().eval()
    torch.manual_seed(1)
    nearest = gs_algos.quantize_weights(Convs().eval(), "int4@channel")
    torch.manual_seed(1)
    algo, model = calibrated(Convs().eval(), data, weight="int4@channel")
    with torch.no_grad():
        want = float_net(data[0])
        assert error(model, want, data[0]) < 0.7 * error(nearest, want, data[0])
        before = model(data[0])
        torch.testing.assert_close(algo.convert(model)(data[0]), before, rtol=1e-4, atol=1e-5)


def test_biases_take_the_mean_error_of_the_outputs():
    data = [x + 3 for x in batches()]
    models = net(), calibrated(net(), data)[1], calibrated(net(), data, bias=False)[1]
    with torch.no_grad():
        want, moved, fixed = (torch.cat([model(x) for x in data]).mean(0) for model in models)
    assert (moved - want).norm() < (fixed - want).norm()


def test_a_rule_sets_scheme_and_rounding_or_leaves_a_layer_float():
    data = batches()
    rules = [("head", None), ("stem", {"weight": "int8@channel", "rounding": "nearest"})]
    algo = PTQ(weight="int4@group:8", rules=rules)
    plan = {row.site: row for row in algo.plan(net(), data[0]).rows}
    assert plan["head"].action == "keep"
    assert plan["stem"].detail.startswith("weight int8@channel") and "nearest" in plan["stem"].detail
    model = algo.apply(net(), data[0])
    algo.calibrate(model, data)
    assert isinstance(algo.convert(model).head, nn.Linear)


def test_a_layer_without_a_token_is_rounded_to_nearest_and_said_so(caplog):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x) if x.shape[0] else self.idle(x)

    algo = PTQ(weight="int4@group:8")
    data = batches()
    model = algo.apply(nn.Sequential(Experts(), nn.Identity()).eval(), data[0])
    algo.calibrate(model, data)
    assert algo.report is not None
    notes = {layer.site: layer.notes for layer in algo.report.layers}
    assert not notes["0.used"] and "no token" in notes["0.idle"][0]
    assert "0.idle" in caplog.text


def test_a_journal_goes_on_where_it_was(tmp_path, monkeypatch):
    data = batches()
    want = calibrated(net(), data)[1].state_dict()
    from gs_algos.ptq import block_loop

    solve, calls = block_loop.solve, []

    def interrupted(*args, **options):
        calls.append(args[-1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return solve(*args, **options)

    monkeypatch.setattr(block_loop, "solve", interrupted)
    algo = PTQ(weight="int4@group:8")
    model = algo.apply(net(), data[0])
    with pytest.raises(KeyboardInterrupt):
        algo.calibrate(model, data, journal=tmp_path / "journal")
    algo = PTQ(weight="int4@group:8", budget=1000)  # which may be another one
    model = algo.apply(net(), data[0])
    algo.calibrate(model, data, journal=tmp_path / "journal")
    assert len(calls) < 2 * len(want)
    for key, value in want.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_a_journal_of_other_options_or_data_is_refused(tmp_path):
    data = batches()
    algo = PTQ(weight="int4@group:8")
    algo.calibrate(algo.apply(net(), data[0]), data, journal=tmp_path / "journal")
    other = PTQ(weight="int4@group:8", refine=1)
    with pytest.raises(ValueError, match="of this model, these options and this data"):
        other.calibrate(other.apply(net(), data[0]), data, journal=tmp_path / "journal")
    again = PTQ(weight="int4@group:8")
    with pytest.raises(ValueError, match="of this model, these options and this data"):
        again.calibrate(again.apply(net(), data[0]), data[:3], journal=tmp_path / "journal")


def test_a_damaged_journal_is_refused(tmp_path):
    data = batches()
    algo = PTQ(weight="int4@group:8")
    algo.calibrate(algo.apply(net(), data[0]), data, journal=tmp_path)
    file = sorted(tmp_path.glob("block-*"))[0]
    file.write_bytes(file.read_bytes()[:100])
    algo = PTQ(weight="int4@group:8")
    with pytest.raises(ValueError, match="damaged"):
        algo.calibrate(algo.apply(net(), data[0]), data, journal=tmp_path)


def test_a_folder_that_is_no_journal_is_refused(tmp_path):
    data = batches()
    (tmp_path / "mine.txt").write_text("mine")
    algo = PTQ(weight="int4@group:8")
    with pytest.raises(ValueError, match="an empty folder or a journal"):
        algo.calibrate(algo.apply(net(), data[0]), data, journal=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_activations_that_are_not_finite_name_the_layer():
    data = batches()
    data[2][5, 3] = torch.nan
    algo = PTQ(weight="int4@group:8")
    with pytest.raises(ValueError, match="stem: the inputs of calibration must be finite"):
        algo.calibrate(algo.apply(net(), data[0]), data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight": "int4@group:7"}, "the group must divide"),
        ({"weight": "int9@channel"}, "1 to 8 bits"),
        ({"rounding": "gtpq"}, "rounding must be one of"),
        ({"correct": 2}, "correct must be in .0, 1."),
        ({"refine": -1}, "refine must be"),
        ({"damp": 0}, "damp must be"),
        ({"order": "big"}, "order must be one of"),
        ({"act": "int4@token"}, "act must be None or 'int8@token'"),
        ({"blocks": "3"}, "blocks must be"),
        ({"rules": [("haed", None)]}, "did you mean head"),
        ({"rules": [("head", {"wieght": "int8@channel"})]}, "did you mean weight"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_touched(options, told):
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=told):
        PTQ(**{"weight": "int4@group:8", **options}).apply(model, batches(1)[0])
    assert type(model.head) is nn.Linear
    for key, value in before.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_batches_without_an_image_round_to_nearest():
    torch.manual_seed(0)
    floats = Convs().eval()
    algo, model = calibrated(copy.deepcopy(floats), [torch.empty(0, 3, 6, 6)] * 3, weight="int4@channel")
    model, want = algo.convert(model), gs_algos.quantize_weights(floats, "int4@channel")
    assert all(torch.equal(getattr(model, name).weight, getattr(want, name).weight) for name in "abc")


@pytest.mark.parametrize("act", [None, "int8@tensor"])
@pytest.mark.parametrize(
    "bad, told",
    [
        (torch.empty(2, 7), "every batch must run through the model, got in stem, with batch 1, RuntimeError"),
        (torch.empty(2, 8).double(), "every batch must run .* in stem, with batch 1, RuntimeError: .*dtype"),
        ("text", "the inputs must hold a tensor, got str"),
    ],
)
def test_a_later_batch_that_does_not_fit_is_told_and_leaves_the_weights(act, bad, told):
    algo, data = PTQ(weight="int4@channel", act=act), batches(2)
    model = algo.apply(net(), data[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"PTQ.calibrate: {told}"):
        algo.calibrate(model, [data[0], bad])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    algo.calibrate(model, data)


def test_calls_in_the_wrong_order_are_refused():
    data = batches()
    algo = PTQ(weight="int4@group:8")
    with pytest.raises(RuntimeError, match="call apply first"):
        algo.calibrate(net(), data)
    model = algo.apply(net(), data[0])
    with pytest.raises(RuntimeError, match="call calibrate"):
        algo.convert(model)
    with pytest.raises(RuntimeError, match="must not be rounded yet"):
        PTQ().apply(model, data[0])
    with pytest.raises(ValueError, match="no forward_loop"):
        algo.calibrate(model, forward_loop=lambda net: None)
    with pytest.raises(ValueError, match="at least one batch"):
        algo.calibrate(model, [])
    algo.calibrate(model, data)
    with pytest.raises(RuntimeError, match="must not be calibrated yet"):
        algo.calibrate(model, data)


def test_nearest_needs_no_data_and_is_what_quantize_weights_does():
    data = batches()
    algo = PTQ(weight="int4@group:8", rounding="nearest", refine=0)
    model = algo.convert(algo.apply(net(), data[0]))
    want = gs_algos.quantize_weights(net(), "int4@group:8")
    for key, value in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_the_config_goes_through_json():
    config = PTQ(weight="int4@group:8", rules=[("head", None)], act="int8@token").config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def calibrated_in_part(data: list[torch.Tensor]) -> tuple[PTQ, Net]:
    algo, model = PTQ(weight="int4@group:8"), net()
    algo.apply(model, data[0])
    bad = model.blocks[1].register_forward_pre_hook(lambda *_: _raise_between(*model.blocks[::2]))
    with pytest.raises(ValueError, match="on purpose"):
        algo.calibrate(model, data)
    bad.remove()
    return algo, model


def test_a_model_that_a_failed_call_has_rounded_in_part_is_refused_and_says_so():
    data = batches()
    algo, model = calibrated_in_part(data)
    assert (
        algo.summary(model) == "PTQ: the calibration failed behind blocks.0.down, layer 4 of 11; build the model anew"
    )
    with pytest.raises(RuntimeError, match="float weights, got 4 of 11 that a call which failed has rounded"):
        algo.calibrate(model, data)


def test_a_model_that_a_failed_call_has_rounded_in_part_says_so_after_loading(tmp_path):
    data = batches()
    _, model = calibrated_in_part(data)
    gs_algos.save(model, tmp_path / "saved")
    loaded = gs_algos.load(tmp_path / "saved", net)
    with pytest.raises(RuntimeError, match="float weights, got some of 11 that a call which failed has rounded"):
        PTQ.resume(loaded).calibrate(loaded, data)


def _raise_between(first: nn.Module, last: nn.Module) -> None:
    if first.down.solved and not last.down.solved:
        raise ValueError("on purpose")


def test_autocast_changes_no_code():
    data = batches()
    _, want = calibrated(net(), data)
    with torch.autocast("cpu", torch.bfloat16):
        algo, got = calibrated(net(), data)
        got = algo.convert(got)
        packed = gs_algos.quantize_weights(net(), "int4@group:8")
    assert torch.equal(got.blocks[2].down.weight, want.blocks[2].down.weight)
    nearest = gs_algos.quantize_weights(net(), "int4@group:8")
    assert torch.equal(packed.head.weight, nearest.head.weight)


def test_packed_layers_take_the_training_flags_of_the_float_ones():
    algo, model = calibrated(net().train(), batches())
    model.head.eval()
    model = algo.convert(model)
    assert model.blocks[0].up.training and not model.head.training


def test_inputs_without_a_batch_axis_are_rows():
    data = [batch[0] for batch in batches(count=4)]
    algo, _ = calibrated(net(), data)
    assert algo.report.rows == 3 and len(algo.report.blocks) == 3


def test_a_layer_may_get_its_input_by_name():
    class Named(Net):
        def forward(self, x):
            return self.head(input=self.stem(x))

    torch.manual_seed(0)
    algo, _ = calibrated(Named().eval(), batches())
    assert [layer.site for layer in algo.report.layers if layer.rows] == ["stem", "head"]


def test_batches_without_a_row_round_to_nearest(caplog):
    algo, model = calibrated(net(), [torch.empty(0, 8)] * 3)
    model = algo.convert(model)
    assert "saw no token" in caplog.text
    want = gs_algos.quantize_weights(net(), "int4@group:8")
    assert torch.equal(model.head.weight, want.head.weight)


def test_a_network_that_another_algorithm_trains_is_refused():
    model = gs_algos.SimQAT().apply(net(), batches()[0])
    with pytest.raises(RuntimeError, match="must be trained, got one that simqat prepared; convert it first"):
        PTQ(weight="int4@group:8").apply(model, batches()[0])


def test_weights_of_3_bits_are_stored_in_4():
    algo, model = PTQ(weight="int3@group:8"), net()
    assert "(stored in 4 bits)" in str(algo.plan(model, batches()[0]))
    model = algo.apply(model, batches()[0])
    algo.calibrate(model, batches())
    want = model(batches()[0])
    model = algo.convert(model)
    assert model.blocks[0].gate.bits == 4
    torch.testing.assert_close(model(batches()[0]), want, rtol=0, atol=1e-5)


class Amplifier(nn.Module):
    """Blocks in which one last bit of what they read turns over codes of all rows behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(12))

    def forward(self, x):
        for block in self.blocks:
            x = torch.sin(60 * block(x))
        return x


def test_rows_that_turn_over_do_not_stop_a_conversion_whose_layers_are_right():
    torch.manual_seed(0)
    data = [torch.randn(64, 32) for _ in range(3)]
    algo = PTQ(weight="int4@group:8", act="int8@token", rounding="nearest", refine=0)
    model = algo.apply(Amplifier().eval(), data[0])
    algo.calibrate(model, data)
    with torch.no_grad():
        want = model(data[0])
        got = algo.convert(model)(data[0])
    assert float((got - want).norm() / want.norm()) > 0.05  # the outputs of the two are that far apart


def test_a_packed_layer_that_gives_something_else_is_named(monkeypatch):
    data = batches()
    algo, model = calibrated(net(), data)
    pack = Rounded.packed_weight

    def wrong(self):
        packed = pack(self)
        return replace(packed, scale=packed.scale * 1.01) if self is model.blocks[1].up else packed

    monkeypatch.setattr(Rounded, "packed_weight", wrong)
    words = r"blocks\.1\.up must give what the calibrated layer gives to 0\.1%, got a difference of"
    with pytest.raises(RuntimeError, match=words):
        algo.convert(model)
    assert isinstance(model.blocks[1].up, Rounded)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x) if bool(x.mean() < 1e3) else self.other(x)


def test_a_packed_layer_that_the_inputs_do_not_reach_is_said_not_to_be_compared(caplog):
    data = batches()
    algo = PTQ(weight="int4@group:8")
    model = algo.apply(Routed(), data[0])
    algo.calibrate(model, data)
    algo.convert(model)
    assert "1 packed layers were not compared, since the inputs do not reach them: other" in caplog.text
