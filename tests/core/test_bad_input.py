"""What cannot work is refused in words that help, and leaves model, ranges and algorithm exactly as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SimQAT
from gs_algos.core.algorithm import history
from gs_algos.core.registry import algorithm_class
from gs_algos.quant.scheme import Scheme
from tests.helpers import Untouched
from tests.nets.convolutional import SmallConvNet, images, train
from tests.nets.graphs import Functional, image

NAN, INF = float("nan"), float("inf")


def prepared(**options: Any) -> tuple[nn.Module, SimQAT]:
    torch.manual_seed(0)
    algo = SimQAT(**options)
    return algo.apply(SmallConvNet(), images()), algo


def with_value(value: float, where: str = "fc.weight") -> SmallConvNet:
    net = SmallConvNet()
    net.get_parameter(where).data.view(-1)[0] = value
    return net


def infinite() -> torch.Tensor:
    x = images()
    x[0, 0, 0, 0] = INF
    return x


class NoLayers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


REFUSED_BY_APPLY: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "channels": (SmallConvNet, torch.ones(2, 3, 12, 12), {}, "must run through the model, got RuntimeError.*3 chan"),
    "rank": (SmallConvNet, torch.ones(12), {}, "must run through the model, got RuntimeError"),
    "nothing": (SmallConvNet, (), {}, "must run through the model, got TypeError.*missing 1 required"),
    "keyword": (SmallConvNet, {"pixels": images()}, {}, "must run through the model, got TypeError.*'pixels'"),
    "integers": (SmallConvNet, images().long(), {}, "must run through the model, got RuntimeError"),
    "empty batch": (
        SmallConvNet,
        images()[:0],
        {},
        r"SimQAT.apply: .*at least one element, got shape \(0, 1, 12, 12\)",
    ),
    "NaN": (SmallConvNet, images() * NAN, {}, r"what stem.input_quantizer sees must be finite, got .*nan"),
    "Inf": (SmallConvNet, infinite(), {}, r"what stem.input_quantizer sees must be finite, got .*inf\]"),
    "Inf, float act": (SmallConvNet, infinite(), {"act": "int8@tensor:mse"}, "must be finite"),
    "NaN weight": (lambda: with_value(NAN), images(), {}, "SimQAT.apply: fc.weight must be finite, got NaN or Inf"),
    "Inf weight": (lambda: with_value(INF), images(), {"act": None}, "fc.weight must be finite"),
    "NaN for LSQ": (lambda: with_value(NAN), images(), {"weight": "int4@channel:lsq"}, "fc.weight must be finite"),
    "Inf for MSE": (lambda: with_value(-INF), images(), {"weight": "int4@channel:mse"}, "fc.weight must be finite"),
    "NaN bias": (lambda: with_value(NAN, "fc.bias"), images(), {}, "fc.bias must be finite"),
    "no layers": (NoLayers, images(), {}, "at least one layer must be quantizable, got none"),
    "all kept": (
        SmallConvNet,
        images(),
        {"rules": [("re:.*", None)]},
        "quantizable, got none:(.|\n)*left float by a rule",
    ),
    "group": (SmallConvNet, images(), {"weight": "int4@group:7"}, "stem: .*divide the 9 weights.* got 7; use group:1"),
    "functional": (Functional, image() * NAN, {}, "must be finite"),
}


@pytest.mark.parametrize("build, inputs, options, words", REFUSED_BY_APPLY.values(), ids=REFUSED_BY_APPLY)
def test_apply_refuses_and_leaves_the_model_as_it_was(build, inputs, options, words):
    net, algo = build().train(), SimQAT(**options)
    if isinstance(net, SmallConvNet):
        net.bn.eval()
    before = Untouched(net)
    with pytest.raises(ValueError, match=words):
        algo.apply(net, inputs)
    assert before
    with pytest.raises(RuntimeError, match="call apply"):
        algo.step()


def test_a_refused_model_can_be_prepared_afterwards():
    net, algo = SmallConvNet(), SimQAT()
    with pytest.raises(ValueError, match="must be finite"):
        algo.apply(net, images() * NAN)
    train(algo.apply(net, images()), algo, steps=1)
    algo.convert(net)
    assert algo.parity.layer_error < 1e-5


@pytest.mark.parametrize("method", ["plan", "apply"])
def test_what_is_no_model_is_a_type_error(method):
    with pytest.raises(TypeError, match=r"model must be a nn\.Module, got str"):
        getattr(SimQAT(), method)("resnet18", images())


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "0 bits": ({"weight": "int0@channel"}, ValueError, "weight must have 1 to 8 bits, got 'int0@channel'"),
    "9 bits": ({"act": "uint9@tensor"}, ValueError, "act must have 1 to 8 bits, got 'uint9@tensor'"),
    "no granularity": ({"weight": "int8"}, ValueError, r"weight must look like \[u\]int<1..8>@.*, got 'int8'"),
    "unknown granularity": ({"weight": "int8@row"}, ValueError, "must be tensor, channel or group:N, got 'int8@row'"),
    "group of 0": ({"weight": "int8@group:0"}, ValueError, "size must be >= 1, got 0"),
    "unknown word": ({"weight": "int8@channel:ema"}, ValueError, "options of weight are minmax.*, got 'ema'"),
    "act by channel": ({"act": "int8@channel"}, ValueError, "activations take one scale per tensor.*use @tensor"),
    "share of 2": ({"act": "int8@tensor:ema=2"}, ValueError, r"argument of ema must be in \(0, 1\]"),
    "narrow 1 bit": ({"weight": "int1@channel:narrow"}, ValueError, "narrow range needs bits >= 2"),
    "no weight": ({"weight": None}, TypeError, "weight must be text such as 'int8@tensor', got None"),
    "number": ({"act": 8}, TypeError, "act must be text such as 'int8@tensor', got 8"),
    "unknown fold": (
        {"fold_bn": "three_conv"},
        ValueError,
        "fold_bn must be one of True, False, one_conv.* 'three_conv'",
    ),
    "list as fold": ({"fold_bn": ["one_conv"]}, ValueError, "fold_bn must be one of"),
    "fold, no fusion": ({"fusion": False}, ValueError, "fold_bn needs fusion=True.*use fold_bn=False"),
    "negative delay": ({"quant_delay": (0, -1)}, ValueError, r"quant_delay must be steps >= 0.*got \(0, -1\)"),
    "three delays": ({"quant_delay": (1, 2, 3)}, ValueError, r"one number or \(activation, weight\), got \(1, 2, 3\)"),
    "half a step": ({"quant_delay": 1.5}, ValueError, "quant_delay must be steps >= 0"),
    "text as steps": ({"freeze_bn": "3"}, ValueError, "freeze_bn must be >= 0 steps or None, got '3'"),
    "misspelt option": (
        {"weigth": "int8@channel"},
        TypeError,
        "options are weight, act.*got weigth; did you mean weight",
    ),
}


@pytest.mark.parametrize("options, kind, words", WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options_are_refused_before_any_model_is_seen(options, kind, words):
    with pytest.raises(kind, match=words):
        SimQAT(**options)


def test_a_config_and_options_together_are_refused():
    with pytest.raises(ValueError, match=r"either in a config or by keyword, got both \(act\)"):
        SimQAT(SimQAT().config, act=None)


WRONG_RULES: dict[str, tuple[Any, str]] = {
    "name": (("block.conv3", None), "got block.conv3 which matches none of: stem, block.*did you mean block.conv2"),
    "block": (("blok", None), "did you mean block"),
    "far name": (("transformer", None), r"got transformer which matches none of: stem[^;]*$"),
    "class": ((nn.Conv3d, None), "got type:Conv3d which matches none.*did you mean type:Conv2d"),
    "type": (("type:LSTM", None), "got type:LSTM which matches none"),
    "expression": (("re:layer.*", None), r"got re:layer\.\* which matches none"),
    "broken expression": (("re:(", None), r"must hold a regular expression, got re:\(: missing"),
    "option": (
        ("fc", {"wieght": "int4@channel"}),
        "may set weight, act, join, got wieght in rule fc; did you mean weight",
    ),
    "join": (("fc", {"join": "int9@tensor"}), "rule fc: join must have 1 to 8 bits, got 'int9@tensor'"),
    "scheme": (("fc", {"weight": "int9@channel"}), "weight must have 1 to 8 bits, got 'int9@channel'"),
    "no pair": ("fc", r"a rule must be \(pattern, options\), got 'fc'"),
    "text for options": (("fc", "int4@channel"), "options of rule fc must be a dict or None, got 'int4@channel'"),
    "number as pattern": ((3, None), r"a rule must be \(pattern, options\), got \(3, None\)"),
}


@pytest.fixture(scope="module")
def float_net() -> nn.Module:
    return SmallConvNet()


@pytest.mark.parametrize("rule, words", WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_wrong_rule_is_named(rule, words, float_net):
    with pytest.raises(ValueError, match=words):
        SimQAT(rules=[("stem", {"act": None}), rule]).plan(float_net, images())


def test_an_unknown_algorithm_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"one of .*simqat.*got 'simqta'; did you mean simqat"):
        algorithm_class("simqta")


def test_methods_out_of_order_say_what_comes_first():
    for method, arguments in (("step", ()), ("calibrate", (SmallConvNet(), [images()])), ("learned_parameters", ())):
        with pytest.raises(RuntimeError, match=rf"SimQAT.{method}: must come between apply and convert; call apply"):
            getattr(SimQAT(), method)(*arguments)
    with pytest.raises(RuntimeError, match=r"SimQAT\.convert: the model must be one that apply prepared, got .* float"):
        SimQAT().convert(SmallConvNet())


def test_a_model_is_prepared_once_and_converted_once():
    net, algo = prepared()
    for each in (algo, SimQAT()):
        before = Untouched(net)
        with pytest.raises(RuntimeError, match="must not be quantized yet, got one that is prepared; build it anew"):
            each.apply(net, images())
        assert before
    algo.step()
    algo.convert(net)
    before = Untouched(net)
    with pytest.raises(RuntimeError, match="got one that is converted"):
        algo.convert(net)
    with pytest.raises(RuntimeError, match="must not be quantized yet, got one that is converted"):
        SimQAT().apply(net, images())
    for call in (algo.step, lambda: algo.calibrate(net, [images()])):
        with pytest.raises(RuntimeError, match="must come between apply and convert"):
            call()
    assert before


def test_a_copy_is_converted_while_the_training_goes_on():
    net, algo = prepared()
    train(net, algo, steps=1)
    twin = algo.convert(copy.deepcopy(net))
    assert history(twin)[-1]["stage"] == "converted" and history(net)[-1]["stage"] == "prepared"
    train(net, algo, steps=1)
    algo.convert(net)
    assert history(net)[-1]["steps"] == 2 and not torch.equal(net(images()), twin(images()))


def test_an_algorithm_counts_the_steps_of_each_model_from_0():
    _, algo = prepared(quant_delay=2)
    algo.step()
    algo.step()
    again = algo.apply(SmallConvNet(), images())
    assert algo.steps == 0
    algo.step()
    assert not bool(again.stem.weight_quantizer.gate)
    algo.step()
    assert bool(again.stem.weight_quantizer.gate)


WRONG_CALIBRATION: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "give either batches or forward_loop"),
    "both": ({"batches": [images()], "forward_loop": len}, "give either batches or forward_loop"),
    "no batch": ({"batches": []}, "at least one batch must run through the prepared model, got none"),
    "idle loop": ({"forward_loop": lambda net: None}, "at least one batch must run"),
    "other model": ({"forward_loop": lambda net: SmallConvNet()(images())}, "at least one batch must run"),
    "NaN": ({"batches": [images(), images() * NAN]}, "what stem.input_quantizer sees must be finite, got .*nan"),
    "Inf": ({"batches": [infinite()]}, "what stem.input_quantizer sees must be finite, got .*inf"),
    "shape": ({"batches": [images() * 9, torch.ones(2, 3, 12, 12)]}, "SimQAT.calibrate: .*must run through the model"),
    "empty batch": ({"batches": [images()[:0]]}, "SimQAT.calibrate: .*at least one element"),
    "one image": ({"batches": images()}, "SimQAT.calibrate: the inputs must run through the model"),
}


@pytest.mark.parametrize("act", ["int8@tensor:ema", "int8@tensor:lsq"])
@pytest.mark.parametrize("arguments, words", WRONG_CALIBRATION.values(), ids=WRONG_CALIBRATION)
def test_a_calibration_that_fails_leaves_the_ranges_and_the_quantization(arguments, words, act, request):
    net, algo = request.getfixturevalue("prepared_nets")[act]
    want, before = net.eval()(images()), Untouched(net)
    with pytest.raises(ValueError, match=words):
        algo.calibrate(net, **arguments)
    assert before and torch.equal(net(images()), want)


@pytest.fixture(scope="module")
def prepared_nets() -> dict[str, tuple[nn.Module, SimQAT]]:
    return {act: prepared(act=act) for act in ("int8@tensor:ema", "int8@tensor:lsq")}


def test_calibration_refuses_a_weight_that_is_not_finite():
    net, algo = prepared(weight="int4@channel:mse")
    net.stem.weight.data[0] = INF
    with pytest.raises(ValueError, match=r"SimQAT\.calibrate: stem\.weight must be finite"):
        algo.calibrate(net, [images()])


def spoilt(where: str, value: float) -> Callable[[nn.Module], None]:
    def act(net: nn.Module) -> None:
        {**dict(net.named_parameters()), **dict(net.named_buffers())}[where].data.view(-1)[0] = value

    return act


def replaced(net: nn.Module) -> None:
    net.fc = nn.Linear(8, 4)


REFUSED_BY_CONVERT: dict[str, tuple[Callable[[nn.Module], None] | None, Any, type[Exception], str]] = {
    "NaN weight": (spoilt("fc.weight", NAN), None, ValueError, "SimQAT.convert: fc.weight must be finite, got NaN or"),
    "Inf bias": (spoilt("block.conv2.bias", INF), None, ValueError, "block.conv2.bias must be finite"),
    "NaN variance": (spoilt("bn.running_var", NAN), None, ValueError, "bn.running_var must be finite"),
    "NaN zero": (spoilt("fc.input_quantizer.zero", NAN), None, ValueError, "fc.input_quantizer.zero must be finite"),
    "Inf range": (spoilt("stem.input_quantizer.scale", INF), None, ValueError, "stem.input_quantizer.scale must be"),
    "no scale": (spoilt("fc.input_quantizer.scale", 0.0), None, ValueError, "every scale must be > 0"),
    "shape": (None, torch.ones(2, 3, 12, 12), ValueError, "convert: the inputs must run through the model"),
    "NaN": (None, images() * NAN, ValueError, "what stem sees of the example inputs must be finite, got NaN or Inf"),
    "empty": (None, images()[:0], ValueError, "convert: .*at least one element"),
    "other layer": (replaced, None, RuntimeError, "convert: fc must be the layer that apply prepared, got Linear"),
}


@pytest.mark.parametrize("change, inputs, kind, words", REFUSED_BY_CONVERT.values(), ids=REFUSED_BY_CONVERT)
def test_convert_refuses_and_leaves_the_trained_model(change, inputs, kind, words, prepared_nets):
    net, algo = copy.deepcopy(prepared_nets["int8@tensor:ema"][0]), prepared_nets["int8@tensor:ema"][1]
    if change is not None:
        change(net)
    before = Untouched(net)
    with pytest.raises(kind, match=words):
        algo.convert(net, inputs)
    assert before


def test_training_on_what_is_no_float_batch_is_refused(prepared_nets):
    net, _ = prepared_nets["int8@tensor:ema"]
    with pytest.raises(TypeError, match=r"the input must be floating point, got torch\.int64"):
        net(images().long())
    assert net.train()(images()[:0]).shape == (0, 4)  # which a float network takes, too


def test_a_scheme_reads_back_as_it_was_written():
    for text in ("int8@channel:minmax:sym", "uint4@group:32:mse:asym", "int2@tensor:minmax:lsq:sym:narrow"):
        assert str(Scheme.parse(text, "weight")) == text
