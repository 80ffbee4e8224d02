"""One grammar of schemes: SLB reads what SimQAT reads, and a typing error is answered with the text that was meant."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.qat.slb.config import SLBConfig
from gs_algos.quant.level_grid import LevelGrid
from gs_algos.quant.scheme import Scheme
from gs_kernels import IntFormat, PerChannel, PerGroup, PerTensor

SAME = {
    "int1@tensor": "1bit@tensor",
    "int2@channel": "2bit@channel",
    "int4@channel:mse": "4bit@channel",
    "int8@tensor:minmax:sym": "8bit@tensor",
    "int4@channel:lsq": "4bit@channel:learned",
}


@pytest.mark.parametrize("scheme, grid", SAME.items())
def test_slb_reads_schemes_and_its_own_words(scheme, grid):
    assert str(LevelGrid.parse(scheme)) == str(LevelGrid.parse(Scheme.parse(scheme, "weight"))) == grid
    assert SLBConfig(weight=scheme) == SLBConfig(weight=grid)
    assert SLBConfig(ends=scheme).ends == grid


SLB_TYPOS = {
    "uint4@channel": "levels that lie evenly around 0, got 'uint4@channel'; use 'int4@channel'",
    "int4@tensor:asym": "levels that lie evenly around 0.*; use 'int4@tensor'",
    "int4@group:128": "a scale per tensor or channel, got 'int4@group:128'; use 'int4@channel'",
    "2bit@group:32": "; use 'int2@channel'",
    "int3@channel:lsq": "1, 2, 4, 8 bits.*; use 'int4@channel:lsq'",
    "int2": "; use 'int2@channel'",
    "2bits@channel": "; use '2bit@channel'",
    "2bit@chanel": "; use '2bit@channel'",
    "2bit@channel:lsq": "; use '2bit@channel:learned'",
    "INT2@channel": "; use 'int2@channel'",
    "w4a8": "; use weight='int4@channel', act='int8@tensor'",
    "fp4": "got 'fp4'$",
    "": "got ''$",
}


@pytest.mark.parametrize("text, words", SLB_TYPOS.items())
def test_what_slb_cannot_read_is_answered_with_what_it_can(text, words):
    with pytest.raises(ValueError, match=f"^SLB: .*{words}"):
        SLB(weight=text)


@pytest.mark.parametrize("value, words", [(2, "got 2; use '2bit@channel'"), (None, "got None$"), (3, "got 3$")])
def test_a_grid_that_is_no_text_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        SLB(weight=value)


TYPOS = {
    ("weight", "int8@chanel"): "'int8@channel'",
    ("weight", "int8@per_channel"): "'int8@channel'",
    ("weight", "int8@group64"): "'int8@group:64'",
    ("weight", "int8"): "'int8@channel'",
    ("weight", "2bit@channel"): "'int2@channel'",
    ("weight", "Int8-Channel"): "'int8@channel'",
    ("weight", "int8@channel:symmetric"): "'int8@channel:sym'",
    ("weight", "w8a8"): "weight='int8@channel', act='int8@tensor'",
    ("weight", "w4a16g128"): "weight='int4@group:128', act=None",
    ("act", "uint8"): "'uint8@tensor'",
    ("act", "int8@chanel"): "'int8@tensor'",
    ("act", "int8@tensor:emma"): "'int8@tensor:ema'",
    ("act", "int8@tensor:percentile:99.9"): "'int8@tensor:percentile=99.9'",
}


@pytest.mark.parametrize("option, use", TYPOS.items(), ids=[text for _, text in TYPOS])
def test_a_typing_error_is_answered_with_the_scheme_that_was_meant(option, use):
    role, text = option
    with pytest.raises(ValueError, match=f"got .*{text}'; use {use}$"):
        SimQAT(**{role: text})


@pytest.mark.parametrize("text", ["bf16", "float8@tensor", "int16@channel", "channel"])
def test_nothing_is_guessed_where_nothing_is_near(text):
    with pytest.raises(ValueError, match=f"got '{text}'$"):
        SimQAT(weight=text)


def test_scheme_objects_in_options_and_rules_are_saved(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    two, act = Scheme.parse("int2@channel", "weight"), Scheme.parse("int8@tensor", "act")
    eight = Scheme.parse("int8@channel", "weight")
    for name, algo in {
        "slb": SLB(weight=two, act=act, rules=[("0", {"weight": eight})], total_steps=2),
        "simqat": SimQAT(weight=two, act=act, rules=[("0", {"weight": eight})]),
    }.items():
        net = algo.apply(build(), torch.randn(2, 8))
        gs_algos.save(net, tmp_path / name)
        again = type(algo).resume(gs_algos.load(tmp_path / name, build))
        assert again.config == algo.config


def test_resume_reads_the_options_as_the_algorithm_does():
    net = SLB(weight="int2@channel", total_steps=2).apply(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    assert SLB.resume(net, weight="int2@channel").config.weight == "2bit@channel"
    with pytest.raises(ValueError, match=r"SLB\.resume: weight must be '2bit@channel', as the search began"):
        SLB.resume(net, weight="int4@channel")


WEIGHTS = ["int8@channel", "int4@group:32:mse", "int3@tensor:percentile=99.123456789:asym:narrow", "int4@channel:lsq"]


@pytest.mark.parametrize(
    "text, role", [*((text, "weight") for text in WEIGHTS), ("uint8@tensor:ema=0.0123456789", "act")]
)
def test_the_text_of_a_scheme_reads_back_as_the_scheme(text, role):
    scheme = Scheme.parse(text, role)
    assert Scheme.parse(str(scheme), role) == scheme == Scheme.parse(scheme, role)


def test_a_scheme_that_is_built_is_the_one_that_is_read():
    assert Scheme(IntFormat(4), PerGroup(32)) == Scheme.parse("int4@group:32", "weight")
    assert Scheme(IntFormat(8), PerTensor(), False, "ema") == Scheme.parse("int8@tensor", "act")


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: Scheme("int4", PerTensor()),
            "must be a FloatFormat or an IntFormat such as .* got .int4",
        ),
        (lambda: Scheme(IntFormat(4), "channel"), r"granularity must be PerTensor\(\), .* got 'channel'"),
        (lambda: Scheme(IntFormat(4), PerTensor(), observer="max"), "observer must be one of ema, .* got 'max'"),
        (lambda: Scheme(IntFormat(4), PerTensor(), observer="ema", argument=2), r"ema must be in \(0, 1\], got 2"),
        (lambda: LevelGrid(3), "LevelGrid: bits must be one of 1, 2, 4, 8, got 3"),
        (lambda: LevelGrid(2, "row"), "LevelGrid: per must be one of none, tensor, channel, got 'row'"),
        (lambda: LevelGrid(2, learned=True), "a learned scale needs per='tensor' or 'channel', got per='none'"),
    ],
)
def test_a_scheme_that_cannot_be_is_not_made(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


ACT, GROUPED, CHANNELS = (
    Scheme.parse("int8@tensor", "act"),
    Scheme(IntFormat(4), PerGroup(32)),
    Scheme(IntFormat(4), PerChannel(0)),
)
INPUTS = Scheme(IntFormat(4), PerChannel(1))
GRID = LevelGrid(2, "channel")


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda: SimQAT(weight=ACT), "weight must find its range by minmax, percentile, mse, got int8@.*ema.*; use"),
        (lambda: SimQAT(weight=INPUTS), "weight must have its channels along axis 0, its outputs, got int4@channel"),
        (lambda: SimQAT(act=GROUPED), "act must have one scale per tensor, got int4@group:32.*; use 'int4@tensor"),
        (
            lambda: SimQAT(weight=GRID),
            "got LevelGrid.*; a LevelGrid is for weights of SLB, use 'int2@channel'",
        ),
        (lambda: SimQAT(act=GRID), "; a LevelGrid is for weights of SLB, use 'int2@tensor'"),
        (lambda: SimQAT(rules=[("0", {"weight": ACT})]), "SimQAT: rule 0: weight must find its range by"),
        (lambda: SimQAT(rules=[("0", {"act": CHANNELS})]), "SimQAT: rule 0: act must have one scale per tensor"),
        (lambda: SLB(weight=ACT), "SLB: weight must find its range by .*; use 'int8@tensor"),
        (lambda: SLB(weight=GROUPED), "SLB: weight must have a scale per tensor or channel, .*; use 'int4@channel'"),
        (lambda: SLB(ends=GROUPED), "SLB: weight must have a scale per tensor or channel"),
        (lambda: SLB(act=GRID), "act must be text .*; a LevelGrid is for weights of SLB, use 'int2@tensor'"),
        (
            lambda: SLB(rules=[(nn.Linear, {"weight": GROUPED})]),
            "SLB: rule Linear: weight must have a scale per tensor",
        ),
        (lambda: gs_algos.quantize_weights(layers(), ACT), "weight must find its range by"),
        (lambda: gs_algos.plan_weights(layers(), "int8@channel", rules=[("0", ACT)]), "weight must find its range by"),
        (lambda: gs_algos.quantize_weights(layers(), GRID), "a LevelGrid is for weights of SLB, use 'int2@channel'"),
        (lambda: gs_algos.quantize_checkpoint(".", "nowhere", ACT), "weight must find its range by"),
    ],
)
def test_a_scheme_of_the_wrong_kind_is_one_clear_line(use, words):
    with pytest.raises((ValueError, TypeError), match=words) as told:
        use()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "algo, use",
    [
        (SimQAT(rules=[("0", CHANNELS)]), "; use {'weight': 'int4@channel:minmax:sym'}"),
        (SimQAT(rules=[("0", "int4@channel")]), "; use {'weight': 'int4@channel'}"),
        (SLB(rules=[("0", GRID)]), "; use {'weight': '2bit@channel'}"),
        (gs_algos.Prune(rules=[("0", 0.25)]), "; use {'rate': 0.25}"),
    ],
)
def test_a_rule_without_the_name_of_its_option_is_told_it(algo, use):
    with pytest.raises(ValueError, match=f"the options of rule 0 must be a dict or None, got .*{re.escape(use)}$"):
        algo.plan(layers(), torch.randn(2, 64))


@pytest.mark.parametrize(
    "objects, texts",
    [
        (
            SimQAT(weight=GROUPED, act=ACT, rules=[("2", {"weight": CHANNELS})]),
            SimQAT(weight=str(GROUPED), act=str(ACT), rules=[("2", {"weight": str(CHANNELS)})]),
        ),
        (
            SLB(weight=GRID, ends=CHANNELS, act=ACT, total_steps=4, rules=[("2", {"weight": LevelGrid(4, "tensor")})]),
            SLB(
                weight="2bit@channel",
                ends="4bit@channel",
                act=str(ACT),
                total_steps=4,
                rules=[("2", {"weight": "4bit@tensor"})],
            ),
        ),
    ],
    ids=["SimQAT", "SLB"],
)
def test_schemes_are_kept_and_saved_as_their_text(objects, texts, tmp_path):
    assert objects.config == texts.config
    net, x = layers(), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert str(objects.plan(net, x)) == str(texts.plan(net, x))
    gs_algos.save(objects.apply(net, x), tmp_path)
    assert type(objects).resume(gs_algos.load(tmp_path, layers)).config == texts.config


def test_packing_takes_and_keeps_schemes(tmp_path):
    net = gs_algos.quantize_weights(layers(), GROUPED, rules=[("2", Scheme(IntFormat(8), PerChannel()))])
    gs_algos.save(net, tmp_path)
    again, x = gs_algos.load(tmp_path, layers), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), net(x)) and (again[0].bits, again[2].bits) == (4, 8)
