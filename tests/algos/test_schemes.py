"""One grammar of schemes: SLB reads what SimQAT reads, and a typing error is answered with the text that was meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SLB, SimQAT
from gs_algos.qat.slb_config import SLBConfig
from gs_algos.quant.scheme import Scheme
from gs_algos.quant.slb_grid import LevelGrid

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
