"""`python -m bench.tables [--check]`: fills the tables of docs/benchmarks.md from the rows in `bench/results`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `--check` writes nothing and fails if one differs from
what the rows say, which is what the tests do. Of rows that measured the same thing the last one counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from bench import record
from bench.synthesis import SCHEMES

WEIGHTS = ("int4@group:64", "int4@channel", "int3@group:64", "int2@group:64")  # that PTQ is compared at
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
Rows: TypeAlias = Sequence[dict[str, Any]]
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", None: "bf16"}


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)] + [[str(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shape_text(shape: dict[str, Any]) -> str:
    """Writes a shape as `x=64x4096 n=4096 bits=4`, without what has its usual value."""
    usual: dict[str, Any] = {"axis": -1, "group": 0, "padding": 0, "stride": 1, "dilation": 1, "groups": 1}
    usual |= {"learned": True, "zero": "middle", "activation": "none"}
    said = {k: v for k, v in shape.items() if v != usual.get(k) and v is not None and v is not False and v != "none"}
    return " ".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple | list) else v}" for k, v in said.items())


def last(rows: Rows, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Picks the last row of each combination of these keys, in the order in which the combinations came."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time", ""))):
        latest[tuple(str(row.get(key)) for key in keys)] = row
    return latest


def accuracy(rows: Rows) -> str:
    """Tabulates means over seeds of top-1, a row per network, data and setting."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    measured = [row for row in rows if row["kind"] == "accuracy"]
    for (model, data, setting, _), row in last(measured, "model", "data", "recipe", "seed").items():
        groups[model, data, setting].append(row)

    def mean(members: Rows, name: str) -> str:
        values = [row["accuracy"][name] for row in members if name in row["accuracy"]]
        return f"{fmean(values):.2f}" if values else "-"

    def differing(members: Rows) -> str:
        parities = [row["parity"] for row in members if row.get("parity")]
        images = sum(p["images"] for p in parities)
        return f"{sum(p['differing_predictions'] for p in parities)} of {images:,}" if parities else "-"

    lines = []
    for (model, data, setting), members in sorted(groups.items()):
        tops = [mean(members, name) for name in ("float", "float_continued", "trained", "converted")]
        lines.append((model, data, setting, len(members), *tops, differing(members)))
    head = ("network", "data", "setting", "seeds", "float", "float +", "trained", "converted", "differing predictions")
    return table(head, lines)


def pruned(rows: Rows) -> str:
    """Tabulates what pruning and ghosts, and what came after, took off a network: each cell before -> after."""

    def cell(ends: Sequence[dict[str, Any]], key: str, batch: str | None, unit: float, digits: int) -> str:
        values = [end.get(key) if batch is None else end.get(key, {}).get(batch) for end in ends]
        return " -> ".join("-" if value is None else f"{value / unit:.{digits}f}" for value in values)

    counts = ("numbers", None, 1e6, 2), ("macs", None, 1e6, 1)
    columns = *counts, ("ms", "1", 1.0, 1), ("ms", "64", 1.0, 1), ("nbytes", None, 1e6, 2), ("peak_bytes", "64", 1e6, 1)
    alone = [row for row in rows if row["kind"] == "accuracy" and row.get("distill") is None]
    cuts = [row for row in alone if row["algorithm"] in ("scop", "prune", "uniprune", "heads", "ghost")]
    sized = [row for row in cuts if "sizes" in row]
    lines = []
    for (model, data, setting), row in sorted(last(sized, "model", "data", "recipe").items()):
        before, *_, after = row["sizes"].values()
        lines.append((model, data, setting, *(cell((before, after), *column) for column in columns)))
    head = ("network", "data", "setting", "million numbers", "million multiply-adds", "one image ms", "64 images ms")
    return table((*head, "network MB", "64 images MB"), lines)


def language(rows: Rows) -> str:
    """Tabulates a row per width of ours and the float model; other libraries beside the row that has their setting."""
    latest = last([row for row in rows if row["kind"] == "language"], "model", "provider", "weights", "embeddings")
    ours = [row for row in latest.values() if row["provider"] in ("float", "golden-stick")]
    peers: dict[str, list[str]] = defaultdict(list)
    for row in latest.values():
        if row not in ours:
            peers[row["weights"]].append(f"{row['provider']} {row['perplexity']:.4g}")
    lines = []
    for row in sorted(ours, key=lambda row: row["perplexity"]):
        others = ", ".join(peers[row["weights"]]) if row["embeddings"] is None else ""
        nbytes = f"{row['nbytes_tensors'] / 1e6:.0f} MB" if "nbytes_tensors" in row else "-"
        widths = _SHORT.get(row["weights"], row["weights"]), _SHORT.get(row["embeddings"], row["embeddings"])
        widths = widths if row["provider"] != "float" else (widths[0], widths[0])
        perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        lines.append((*widths, perplexity, nbytes, row.get("tokens_per_s", "-"), others))
    head = ("weights", "embeddings", "perplexity", "tensors", "tokens/s", "perplexity of another library")
    return table(head, lines)


def ptq(rows: Rows) -> str:
    """Tabulates a row per setting of PTQ: perplexity, the layers' errors over rounding to nearest, time and memory."""
    ours = [row for row in rows if row["kind"] == "ptq" and "provider" not in row]
    latest = last(ours, "model", "setting", "samples", "context")
    lines = []
    models = list(dict.fromkeys(row["model"] for row in ours))
    for row in sorted(latest.values(), key=lambda row: (models.index(row["model"]), row["perplexity"])):
        kept = [f"{row[name]:.3f}" if name in row else "-" for name in ("ratio", "held_out")]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "-"
        tokens = f"{row['samples'] * row['context']:,}" if "ratio" in row else "-"
        value = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        change, name = f"{row['perplexity_change']:+.1%}", Path(row["model"]).stem
        lines.append((name, row["setting"], value, change, *kept, tokens, seconds, memory))
    head = (
        "model",
        "setting",
        "perplexity",
        "against float",
        "error / nearest",
        "held out",
        "tokens",
        "seconds",
        "peak",
    )
    return table(head, lines)


def synthesis(rows: Rows) -> str:
    """Tabulates students and calibrations without data: a row per network, data and run, of its last step."""
    measured = [row for row in rows if row["kind"] == "synthesis"]
    lines = []
    for row in last(measured, "model", "data", "loss", "width", "batch_size", "of", "seed").values():
        found = row["accuracy"]
        pairs = [(scheme, [found[f"{scheme} on {on}"] for on in ("data", "synthetic", "noise")]) for scheme in SCHEMES]
        calibrated = (" / ".join(f"{value:.2f}" for value in values) for _, values in pairs)
        images = f"{row['steps']:,} x {row['batch_size']}"
        ours = (f"{found[name]:.2f}" for name in ("float", "student", "noise"))
        lines.append((row["model"], row["data"], row["loss"], images, *ours, *calibrated))
    told = (f"{scheme} on data / synthetic / noise" for scheme in SCHEMES)
    return table(("network", "data", "loss", "images", "float", "student", "student on noise", *told), lines)


def ptq_peers(rows: Rows) -> str:
    """Tabulates rows of PTQ that round weights alone as other libraries did too: ours and theirs, by weights."""
    theirs = tuple(row["model"] for row in rows if row["kind"] == "ptq" and "provider" in row)
    measured = [row for row in rows if row["kind"] == "ptq" and row["model"].startswith(theirs)]
    schemes = [scheme for scheme in WEIGHTS if any(row.get("weight") == scheme for row in measured)]
    lines = []
    latest = last(measured, "provider", "setting", "samples", "context", "steps").values()
    for row in sorted(latest, key=lambda row: row["perplexity"]):
        weight, _, method = row["setting"].partition(" ")
        if weight not in schemes or "@" in method:  # "@": of activations or of keys and values
            continue
        name = f"{row['provider']} {row['version']}" if "provider" in row else "golden-stick"
        told = f"{method}, {row['steps']} steps" if "steps" in row else method
        value = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        times = (f"{row[key]:.0f}" if key in row else "-" for key in ("seconds", "cpu_seconds"))
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "-"
        change = f"{row['perplexity_change']:+.1%}"
        lines.append((weight, name, told, value, change, *times, row["threads"], memory))
    lines.sort(key=lambda line: schemes.index(line[0]))
    head = ("weights", "library", "method", "perplexity", "against float", "seconds", "CPU seconds", "threads", "peak")
    return table(head, lines)


def serving(rows: Rows) -> str:
    """Tabulates a row per width that vLLM served: one client's tokens per second, then those of many together."""
    latest = last([row for row in rows if row["kind"] == "serving"], "model", "provider", "weights", "embeddings")
    lines = []
    for row in sorted(latest.values(), key=lambda row: -row["nbytes_tensors"]):
        widths = _SHORT.get(row["weights"], row["weights"]), _SHORT.get(row["embeddings"], row["embeddings"])
        load = f"{row['clients']} for {row['seconds']:.0f} s", f"{row['requests']}, none failed"
        times = row["request_ms_p50"], row["request_ms_p95"]
        speeds = row["single_tokens_per_s"], row["tokens_per_s"]
        lines.append((*widths, _mb(row["nbytes_tensors"]), speeds[0], *load, speeds[1], *times))
    head = ("weights", "embeddings", "tensors MB", "one client tokens/s", "clients", "requests", "tokens/s")
    return table((*head, "request ms p50", "p95"), lines)


def products(rows: Rows) -> str:
    """Tabulates speed against a float product's, of qmatmul rows that were timed beside `float_linear`, per device."""
    keys = ("device_name", "instructions", "shape", "dtype")
    measured = [row for row in rows if row["kind"] == "op" and row["op"] == "qmatmul" and "ms_p20" in row]
    ours = last([row for row in measured if row["provider"] == "ours"], *keys)
    dense = last([row for row in measured if row["provider"] == "float_linear"], *keys)
    speedups: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for key, row in ours.items():
        if key in dense:
            shape = row["shape"]
            m = rows_of(shape)
            size = f"{shape['n']}x{shape['x'][-1]}"
            dtype = _SHORT.get(row["dtype"], row["dtype"])
            name = f"{record.device_text(row)}, {dtype}", size, shape["bits"]
            speedups[name][m] = dense[key]["ms_p20"] / row["ms_p20"]
    sizes = sorted({m for one in speedups.values() for m in one})
    cells = ((*name, *(f"{one[m]:.2f}x" if m in one else "" for m in sizes)) for name, one in sorted(speedups.items()))
    return table(("device", "layer", "bits", *(f"{m} rows" for m in sizes)), cells)


OURS = ("ours", "torch", "compile")  # the first is measured against the others, then against libraries


def ops(rows: Rows) -> str:
    """Tabulates each call that was timed: ours, and how many times as long the others took."""
    keys = ("device_name", "instructions", "op", "shape", "dtype", "direction")
    latest = last([row for row in rows if row["kind"] == "op" and "ms_p50" in row], *keys, "provider")
    calls: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for (*key, provider), row in latest.items():
        calls[tuple(key)][provider] = row
    lines = []
    for (_, _, op, *_), by in sorted(calls.items()):
        if "ours" not in by:
            continue
        ours = by["ours"]
        device = record.device_text(ours)
        ratio = {name: f"{row['ms_p50'] / ours['ms_p50']:.2f}x" for name, row in by.items()}
        others = ", ".join(f"{name} {text}" for name, text in sorted(ratio.items()) if name not in OURS)
        shape = shape_text(ours["shape"]), _SHORT[ours["dtype"]], ours["direction"]
        lines.append((device, op, *shape, f"{ours['ms_p50']:.3g}", *(ratio.get(n, "-") for n in OURS[1:]), others))
    return table(("device", "op", "shape", "dtype", "pass", "ours ms", "eager", "compile", "libraries"), lines)


def models(rows: Rows) -> str:
    """Tabulates a row per network and algorithm: its training step, then what it was converted to.

    Times of float are those that the same commit measured.
    """
    measured = [row for row in rows if row["kind"] == "model" and "ms_p50" in row]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    floats: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(measured, key=lambda row: str(row["time"])):
        network = record.device_text(row), row["network"], tuple(row["input"])
        groups[(*network, row["algorithm"])][row["phase"]] = row
        if row["algorithm"] == "float":
            floats[(*network, row["phase"], row["commit"])] = row
    lines = []
    networks = list(dict.fromkeys(key[:3] for key in groups))
    for (device, network, size, algorithm), by in sorted(
        groups.items(), key=lambda group: networks.index(group[0][:3])
    ):
        bases = {phase: floats.get((device, network, size, phase, row["commit"])) for phase, row in by.items()}
        cells = {phase: _against(by.get(phase), bases.get(phase)) for phase in ("train", "latency", "throughput")}
        step = by.get("train", {})
        kept = _mb(step.get("saved_bytes", step.get("peak_bytes")))
        batch = {**by.get("throughput", {}), **step}.get("batch", "-")
        run = device, f"{network} {'x'.join(map(str, size))}", batch, algorithm
        weights = _mb(by.get("latency", {}).get("nbytes"))
        lines.append((*run, cells["train"], kept, cells["latency"], cells["throughput"], weights))
    head = ("device", "network", "batch", "algorithm", "training step ms", "MB for backward")
    return table((*head, "one input ms", "batch ms", "weights MB"), lines)


def convolutions(rows: Rows) -> str:
    """Tabulates each network, every shape counted once: milliseconds, ratios to float32, and our slowest shape."""
    keys = ("device_name", "instructions", "network", "batch", "layer")
    latest = last([row for row in rows if row["kind"] == "convolution"], *keys)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in latest.values():
        groups[record.device_text(row), row["network"], row["batch"]].append(row)
    lines = []
    for network, members in sorted(groups.items()):
        float32 = sum(row["ms"]["float32"] for row in members)
        cells = []
        for name in ("bfloat16", "compile", "w4", "w8a8"):
            timed = [row["ms"] for row in members if name in row["ms"]]
            share = sum(ms[name] for ms in timed) / sum(ms["float32"] for ms in timed) if timed else 0.0
            cells.append(f"{share:.2f}x" if timed else "-")
        ratio, slow = max(
            ((row["ms"]["w8a8"] / row["ms"]["float32"], row) for row in members), key=lambda pair: pair[0]
        )
        layer = " ".join(f"{k}={v}" for k, v in slow["layer"].items())
        lines.append((*network, len(members), f"{float32:.2f}", *cells, f"{ratio:.2f}x {layer}"))
    head = ("device", "network", "batch", "shapes", "fp32 ms", "bf16", "compile", "w4", "w8a8", "slowest w8a8")
    return table(head, lines)


def adder(rows: Rows) -> str:
    """Tabulates L1 products on a CPU beside convolutions: milliseconds."""
    latest = last([row for row in rows if row["kind"] == "adder"], "device_name", "instructions", "layer")
    names = ("adder", "conv2d", "cdist", "adder dx", "conv2d dx", "adder int8", "conv2d int8")
    lines = []
    for row in latest.values():
        layer = " ".join(f"{k}={v}" for k, v in row["layer"].items())
        lines.append((record.device_text(row), layer, *(f"{row['ms'][name]:.2f}" for name in names), row["busy"]))
    return table(("device", "layer", *names, "load"), lines)


def adder_planes(rows: Rows) -> str:
    """Tabulates L1 products of codes of few bits beside products of their planes: milliseconds."""
    latest = last([row for row in rows if row["kind"] == "adder planes"], "device_name", "instructions", "layer")
    lines = []
    for row in latest.values():
        layer, ms = " ".join(f"{k}={v}" for k, v in row["layer"].items()), row["ms"]
        planes = (f"{ms[name]:.2f} ({ms[name] / ms['adder int8']:.1f}x)" for name in ("planes 2 bit", "planes 3 bit"))
        lines.append((record.device_text(row), layer, f"{ms['adder int8']:.2f}", *planes, row["busy"]))
    return table(("device", "layer", "adder int8", "planes, 2 bits", "planes, 3 bits", "load"), lines)


def photographs(rows: Rows) -> str:
    """Tabulates what is left of a network's outputs on photographs, by how it was quantized."""
    latest = last([row for row in rows if row["kind"] == "photographs" and "sqnr_db" in row], "model", "setting")
    lines = []
    for (model, setting), row in latest.items():
        beside = f" (torch: {row['torch_sqnr_db']:.1f})" if "torch_sqnr_db" in row else ""
        tops = f"{row['top1_kept']} of {row['views']}", " and ".join(f"{n} of 5" for n in row["top5_kept"])
        megabytes = _mb(row["nbytes"]["converted"]), f"{row['ms']['converted'] / row['ms']['float']:.2f}x"
        lines.append((model, setting, f"{row['sqnr_db']:.1f}{beside}", *tops, *megabytes))
    head = ("network", "setting", "logits dB", "top-1 kept", "top-5 kept", "MB", "time of float")
    return table(head, lines)


def features(rows: Rows) -> str:
    """Tabulates how well images are classified by the features of a network, by how it was quantized."""
    latest = last([row for row in rows if row["kind"] == "features"], "model", "data", "setting")
    lines = []
    for (model, data, setting), row in latest.items():
        images = f"{data}, {row['test']:,} of {row['train']:,}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] >= 1 else ""
        change = row["changed"], f"{100 * row['error']:.1f}"
        lines.append((model, images, setting, f"{row['accuracy']:.2f}", *change, seconds))
    head = ("network", "images", "setting", "accuracy %", "classes that differ", "error of features %", "seconds")
    return table(head, lines)


def sensitivity(rows: Rows) -> str:
    """Makes a row for each network, range of widths and score."""
    head = ("network", "data", "float", "bits", "score", "rank correlation", "seconds")
    found = last([row for row in rows if row["kind"] == "sensitivity"], "model", "data", "widths", "score")
    return table(
        head,
        (
            (*key[:2], f"{row['accuracy']:.2f}", *key[2:], f"{row['correlation']:.2f}", f"{row['seconds']:.1f}")
            for key, row in found.items()
        ),
    )


def search(rows: Rows) -> str:
    """Makes a row for each way to search, of equal settings: means over its seeds."""
    keys = ("model", "task", "data", "float_epochs", "tune_images", "epochs", "evaluations")
    found = last([row for row in rows if row["kind"] == "search"], *keys, "way", "seed")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for key, row in found.items():
        groups[key[:-1]].append(row)
    tasks = {"bits": "3 bits", "rates": "half of the MACs", "both": "6 % of the bytes"}
    head = (
        "network",
        "task",
        "way",
        "seeds",
        "bytes",
        "million MACs",
        "ms",
        "accuracy %",
        "tuned %",
        "each seed",
        "search CPU s",
    )
    lines = []
    for key, members in sorted(groups.items(), key=lambda group: group[0][:-1]):
        mean = {
            name: fmean(row[name] for row in members)
            for name in ("nbytes", "macs", "ms", "untuned", "accuracy", "search_cpu_seconds")
        }
        each = ", ".join(f"{row['accuracy']:.2f}" for row in sorted(members, key=lambda row: row["seed"]))
        size = f"{mean['nbytes']:,.0f}", f"{mean['macs'] / 1e6:.1f}", f"{mean['ms']:.2f}"
        got = f"{mean['untuned']:.2f}", f"{mean['accuracy']:.2f}", each
        lines.append((key[0], tasks[key[1]], key[-1], len(members), *size, *got, f"{mean['search_cpu_seconds']:.0f}"))
    return table(head, lines)


def analysis(rows: Rows) -> str:
    """Makes a row for each tool that analyses layers."""
    head = ("tool", "version", "bits", "layers with a number", "predicts the loss", "seconds", "writes")
    lines = []
    for (tool,), row in last([row for row in rows if row["kind"] == "analysis"], "tool").items():
        written = (
            f"{row['files']} file{'s' if row['files'] > 1 else ''}, {row['bytes'] / 1000:,.0f} kB"
            if row["files"]
            else "text on the terminal"
        )
        written += ", which load scripts from the network" if row["loads_from_network"] else ""
        predicts = f"{row['correlation']:.2f}" if "correlation" in row else "-"
        lines.append(
            (tool, row["version"], row["bits"], row["layers"] or "-", predicts, f"{row['seconds']:.1f}", written)
        )
    return table(head, lines)


def reports(rows: Rows) -> str:
    """Makes a row for each example page: what its first advice predicted, and what the packed network gave."""
    head = ("network", "quantized by", "error %", "predicted %", "measured %", "KL nats", "predicted", "measured")
    keys = ("divergence", "predicted_divergence", "measured_divergence")
    found = last([row for row in rows if row["kind"] == "report" and "error" in row], "network", "setting")
    errors = ("error", "predicted_error", "measured_error")
    lines = (
        (*key, *(f"{100 * row[e]:.1f}" for e in errors), *(f"{row[k]:.3g}" for k in keys), f"{row['seconds']:.0f}")
        for key, row in found.items()
    )
    return table((*head, "seconds of the report"), lines)


def _against(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Writes milliseconds, and how many times as many as those of the float network."""
    if row is None:
        return "-"
    times = f" ({row['ms_p50'] / base['ms_p50']:.2f}x)" if base is not None and base is not row else ""
    return f"{row['ms_p50']:.1f}{times}"


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"


def decode(rows: Rows) -> str:
    keys = ("device_name", "instructions", "network", "dtype", "weights", "graph")
    latest = last([row for row in rows if row["kind"] == "decode" and "per_s" in row], *keys)
    lines = (
        (
            record.device_text(row),
            key[2],
            _SHORT[key[3]],
            row.get("weights", "-"),
            "graph" if row.get("graph") else "-",
            row.get("first_ms", "-"),
            row["per_s"],
            _mb(row["nbytes"]),
        )
        for key, row in sorted(latest.items())
    )
    return table(("device", "model", "dtype", "weights", "step", "first ms", "tokens/s", "tensors MB"), lines)


def rows_of(shape: dict[str, Any]) -> int:
    m = 1
    for size in shape["x"][:-1]:
        m *= size
    return m


TABLES: dict[str, Callable[[Rows], str]] = {
    "accuracy": accuracy,
    "pruned": pruned,
    "language": language,
    "ptq": ptq,
    "reports": reports,
    "sensitivity": sensitivity,
    "search": search,
    "analysis": analysis,
    "ptq-peers": ptq_peers,
    "synthesis": synthesis,
    "products": products,
    "ops": ops,
    "models": models,
    "decode": decode,
    "photographs": photographs,
    "features": features,
    "serving": serving,
    "convolutions": convolutions,
    "adder": adder,
    "adder-planes": adder_planes,
}


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of every measured file; static figures are no rows of this kind."""
    files = [path for path in sorted(folder.glob("*/*.jsonl")) if path.parent.name != "static"]
    return [row for path in files for row in record.read_rows(path)]


def fill(text: str, rows: Rows) -> str:
    """Returns the text with its tables made anew.

    Raises:
        ValueError: if a table is not known, or has no rows.
    """

    def made(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"bench.tables: table must be one of {', '.join(TABLES)}, got {name!r}")
        filled = TABLES[name](rows)
        if filled.count("\n") < 2:
            raise ValueError(f"bench.tables: {name} needs rows in bench/results, got none")
        return f"{match[1]}{filled}\n{match[3]}"

    return _PLACE.sub(made, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a table is not what rows say"
    )
    parser.add_argument("--file", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    parser.add_argument("--rows", type=Path, default=record.RESULTS, help="default: bench/results")
    chosen = parser.parse_args(argv)
    try:
        before = chosen.file.read_text()
        after = fill(before, all_rows(chosen.rows))
    except (OSError, ValueError) as error:
        print(error if isinstance(error, ValueError) else f"bench.tables: --file: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        if after != before:
            print(f"bench.tables: {chosen.file} must hold the tables of the rows; run `python -m bench.tables`")
        return int(after != before)
    chosen.file.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
