"""Makes the parts of a report that tests put on a page, without a network."""

from __future__ import annotations

import math
import random
from typing import Any

from gs_algos.analysis.advice import Advice
from gs_algos.analysis.comparison import Comparison, Histogram, LayerComparison
from gs_algos.analysis.effect import Effect, NetworkFacts
from gs_algos.analysis.latency import LayerTimes
from gs_algos.analysis.quality import Quality
from gs_algos.analysis.report.page import Report
from gs_algos.analysis.report.trade_off import TradeOff
from gs_algos.analysis.sensitivity import Sensitivity
from gs_algos.core.timing import Timing

SCHEMES = ("int2@channel", "int4@channel", "int8@channel")


def histogram(low: float = -3.5, high: float = 3.5, bins: int = 64, peak: int = 900) -> Histogram:
    middle = (bins - 1) / 2
    counts = tuple(round(peak * math.exp(-(((i - middle) / bins * 5) ** 2))) for i in range(bins))
    return Histogram(low, high, counts)


def layer(site: str = "fc", **changed: Any) -> LayerComparison:
    facts: dict[str, Any] = {
        "site": site,
        "kind": "PackedConv",
        "weight": "int4@channel",
        "act": "int8@tensor:ema",
        "bits": 4.12,
        "nbytes": 1200,
        "float_nbytes": 9216,
        "sqnr": 21.5,
        "local_sqnr": 24.0,
        "cosine": 0.996,
        "clipped": 0.0004,
        "levels_used": 15,
        "levels": 16,
        "weight_values": histogram(-7.4, 7.4),
        "weight_grid": tuple(float(q) for q in range(-8, 8)),
        "input_values": histogram(0.0, 5.1),
        "input_range": (0.0, 4.2),
        "share_zero": 0.11,
    }
    return LayerComparison(**{**facts, **changed})


def comparison(layers: Any = (), output_sqnr: float = 18.2, notes: tuple[str, ...] = ()) -> Comparison:
    return Comparison(tuple(layers), output_sqnr, notes)


def timing(p50: float) -> Timing:
    return Timing(p50 * 0.98, p50, p50 * 1.06, 40)


def facts(share: float = 1.0, ms: float = 1.0, quality: Quality | float | None = 0.912, **changed: Any) -> NetworkFacts:
    measured = quality if isinstance(quality, Quality) else None
    if isinstance(quality, float):
        measured = Quality("accuracy", quality, quality - 0.012, quality + 0.011, 2000)
    given = {
        "nbytes": round(1_112_224 * share),
        "disk_bytes": round(1_140_896 * share),
        "numbers": 4_652_008,
        "macs": 385_870_000,
        "bops": round(395_100_000_000 * share),
        "ms": {1: timing(42.12 * ms), 32: timing(911.0 * ms)},
        "peak_bytes": {1: 9_640_000, 32: 308_000_000},
        "quality": measured,
    }
    return NetworkFacts(**{**given, **changed})


def effect(before: Any = None, after: Any = None, **changed: Any) -> Effect:
    given = {"samples": 2000, "differing": 61, "divergence": 0.0231, "error": 0.0812, "notes": ()}
    pair = {"before": before or facts(), "after": after or facts(0.247, 0.76, 0.905)}
    return Effect(**{**pair, **given, **changed})


def times(total: float, layers: dict[str, float], agrees: bool = True) -> LayerTimes:
    return LayerTimes(total, layers, total - sum(layers.values()), agrees, 1, 12.0)


def advice(text: str = "Raise two layers to 8 bits.", **changed: str) -> Advice:
    given = {
        "why": "They cause 71 % of the predicted divergence, with 3 % of the bytes.",
        "rules": 'rules=[\n    ("layer1.0.conv1|fc", {"weight": "int8@channel"}),\n]',
        "verified": "a run with them has a KL divergence of 0.0079 nats (predicted: 0.0091).",
    }
    return Advice(text, **{**given, **changed})


def sites(blocks: int = 3, roles: tuple[str, ...] = ("conv1", "conv2")) -> list[str]:
    return ["conv1", *(f"layer{s}.{b}.{role}" for s in (1, 2, 3) for b in range(blocks) for role in roles), "fc"]


def decoder(blocks: int) -> list[str]:
    roles = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    roles = (*roles, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return ["model.embed_tokens", *(f"model.layers.{b}.{role}" for b in range(blocks) for role in roles)]


def trade_off(names: list[str]) -> TradeOff:
    """Makes what a search found: costs and losses, a few of them predicted."""
    front = [(2e5 * i, 0.3 / i**2) for i in range(1, 6)]
    rules = tuple(f"({name!r}, {{'weight': 'int4@channel'}})" for name in names[:1])
    return TradeOff("bytes", 1.1e6, 5e5, "KL divergence in nats", front[1], front, front[::2], rules)


def full(names: list[str] | None = None, title: str = "ResNet20") -> Report:
    """Makes a report with all of its parts."""
    names = sites() if names is None else names
    rng = random.Random(0)
    layers, ms, scores = [], ({}, {}), {}
    for i, site in enumerate(names):
        weight = "float32" if i == 0 else "int8@channel" if site.endswith(("fc", "down_proj")) else "int4@channel"
        bits = {"float32": 32.0, "int8@channel": 8.11, "int4@channel": 4.12}[weight]
        levels = {"float32": 0, "int8@channel": 256, "int4@channel": 16}[weight]
        numbers = round(10 ** rng.uniform(3, 5))
        local = rng.gauss(24, 3) + (18 if levels == 256 else 0)
        half = max(1, levels // 2)
        layers.append(
            layer(
                site,
                weight=weight,
                act="" if i == 0 else "int8@tensor:ema",
                bits=bits,
                nbytes=round(numbers * bits / 8),
                float_nbytes=numbers * 4,
                local_sqnr=math.inf if i == 0 else local,
                sqnr=math.inf if i == 0 else 23 - 9 * i / len(names) + rng.gauss(0, 1),
                levels=levels,
                levels_used=max(0, levels - rng.randint(0, 4)),
                weight_values=histogram(-half * rng.uniform(0.8, 1.1), half * rng.uniform(0.8, 1.0)),
                weight_grid=tuple(float(q) for q in range(-half, half)) if levels else (),
                input_values=histogram(0.0, rng.uniform(3, 9)),
                input_range=None if i == 0 else (0.0, rng.uniform(3, 6)),
                clipped=None if i == 0 else 10 ** rng.uniform(-5, -1.5),
            )
        )
        ms[0][site], ms[1][site] = numbers / 40_000, numbers / 60_000
        scores[site] = {scheme: 10 ** rng.uniform(-1.5, 0) * 0.12**k for k, scheme in enumerate(SCHEMES)}
    steps = list(range(0, 2000, 20))
    levels_of = {site: {-1: 0.31, 0: 0.38, 1: 0.31} for site in names[1:5]}
    return Report(
        title,
        effect=effect(),
        comparison=comparison(layers, notes=("conv1 stayed float: a rule says so",)),
        sensitivity=Sensitivity(scores, "kl", 512, seconds=8.0),
        times=tuple(times(math.fsum(of.values()) * 1.08, of) for of in ms),
        advice=(advice(), advice("Recalibrate layer3.2.conv2.", why="3.1 % of its inputs are clipped.", verified="")),
        history=({"algorithm": "simqat", "stage": "converted", "config": {"weight": "int4@channel", "rules": []}},),
        search={
            "step": steps,
            "gap": {site: [math.exp(-s / (400 + 40 * i)) for s in steps] for i, site in enumerate(names)},
            "temperature": [math.exp(-s / 400) for s in steps],
            "levels": levels_of,
        },
        channels={site: (64, 64 - 5 * (i % 9)) for i, site in enumerate(names[:12])},
        trade_off=trade_off(names),
        notes=("Times are of one thread.",),
        made={
            "command": "golden-stick report a b",
            "torch": "2.13",
            "device": "CPU, AVX-512 VNNI",
            "date": "2026-11-29",
        },
    )
