"""Tabulates language models: perplexity, memory, tokens per second."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import record
from bench.tables.cells import SHORT, Rows, last, mb, table

WEIGHTS = ("int4@group:64", "int4@channel", "int3@group:64", "int2@group:64")  # that PTQ is compared at


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
        widths = SHORT.get(row["weights"], row["weights"]), SHORT.get(row["embeddings"], row["embeddings"])
        widths = widths if row["provider"] != "float" else (widths[0], widths[0])
        perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        lines.append((*widths, perplexity, nbytes, row.get("tokens_per_s", "-"), others))
    head = ("weights", "embeddings", "perplexity", "tensors", "tokens/s", "perplexity of another library")
    return table(head, lines)


def ptq(rows: Rows) -> str:
    """Tabulates a row per setting of PTQ: perplexity, the layers' errors over rounding to nearest, time and memory."""
    ours = [row for row in rows if row["kind"] == "ptq" and "provider" not in row]
    latest = last(ours, "model", "setting", "samples", "context", "window", "steps")
    lines = []
    models = list(dict.fromkeys(row["model"] for row in ours))
    for row in sorted(latest.values(), key=lambda row: (models.index(row["model"]), row["perplexity"])):
        kept = [f"{row[name]:.3f}" if name in row else "-" for name in ("ratio", "held_out")]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "-"
        value = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        change, name = f"{row['perplexity_change']:+.1%}", Path(row["model"]).stem
        lines.append((name, _told(row, row["setting"]), value, change, *kept, _tokens(row), seconds, memory))
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


def distilled(rows: Rows) -> str:
    """Tabulates a row per language model that its float self taught: perplexity before, behind, and of the teacher."""
    runs: dict[tuple[object, ...], dict[int, dict[str, object]]] = defaultdict(dict)
    for row in (row for row in rows if row["kind"] == "distill"):
        key = tuple(row[name] for name in ("model", "weight", "start", "of", "batch_size", "context", "lr", "seed"))
        runs[key][row["step"]] = row
    lines = []
    for steps in runs.values():
        first, row = steps[0], steps[max(steps)]
        name = Path(str(row["model"])).stem
        values = (f"{step['perplexity']:.4g}" for step in (first, row))
        told = f"{row['trained_tokens']:,}", *values, f"{row['float']:.4g}", row["lr"]
        lines.append((name, row["weight"], row["start"], *told, f"{float(str(row['cpu_seconds'])) / 60:.0f}"))
    lines.sort(key=lambda line: (str(line[0]), str(line[1]), str(line[3])))
    head = (
        "model",
        "weights",
        "from",
        "tokens",
        "perplexity before",
        "behind",
        "of the teacher",
        "rate",
        "CPU minutes",
    )
    return table(head, lines)


def ptq_peers(rows: Rows) -> str:
    """Tabulates rows of PTQ that round weights alone as other libraries did too: ours and theirs, by weights."""
    theirs = tuple(row["model"] for row in rows if row["kind"] == "ptq" and "provider" in row)
    measured = [row for row in rows if row["kind"] == "ptq" and row["model"].startswith(theirs)]
    schemes = [scheme for scheme in WEIGHTS if any(row.get("weight") == scheme for row in measured)]
    lines = []
    latest = last(measured, "provider", "setting", "samples", "context", "window", "steps").values()
    for row in sorted(latest, key=lambda row: row["perplexity"]):
        weight, _, method = row["setting"].partition(" ")
        if weight not in schemes or "@" in method:  # "@": of activations or of keys and values
            continue
        name = f"{row['provider']} {row['version']}" if "provider" in row else "golden-stick"
        value = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:,.0f}"
        times = (f"{row[key]:.0f}" if key in row else "-" for key in ("seconds", "cpu_seconds"))
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "-"
        change = f"{row['perplexity_change']:+.1%}"
        lines.append((weight, name, _told(row, method), _tokens(row), value, change, *times, row["threads"], memory))
    lines.sort(key=lambda line: schemes.index(line[0]))
    head = "weights", "library", "method", "tokens", "perplexity", "against float"
    return table((*head, "seconds", "CPU seconds", "threads", "peak"), lines)


def _told(row: dict[str, Any], method: str) -> str:
    """Returns a method with its steps, and with its windows where they are not those of the measurement."""
    told = f", {row['steps']} steps" if "steps" in row else ""
    return method + told + (f", {row['samples']} windows of {row['window']}" if "window" in row else "")


def _tokens(row: dict[str, Any]) -> str:
    """Returns how many tokens were calibrated on: nearest and HQQ read none."""
    is_calibrated = "ratio" in row or ("provider" in row and "samples" in row)
    return f"{row['samples'] * row.get('window', row['context']):,}" if is_calibrated else "-"


def serving(rows: Rows) -> str:
    """Tabulates a row per width that vLLM served: one client's tokens per second, then those of many together."""
    latest = last([row for row in rows if row["kind"] == "serving"], "model", "provider", "weights", "embeddings")
    lines = []
    for row in sorted(latest.values(), key=lambda row: -row["nbytes_tensors"]):
        widths = SHORT.get(row["weights"], row["weights"]), SHORT.get(row["embeddings"], row["embeddings"])
        load = f"{row['clients']} for {row['seconds']:.0f} s", f"{row['requests']}, none failed"
        times = row["request_ms_p50"], row["request_ms_p95"]
        speeds = row["single_tokens_per_s"], row["tokens_per_s"]
        lines.append((*widths, mb(row["nbytes_tensors"]), speeds[0], *load, speeds[1], *times))
    head = ("weights", "embeddings", "tensors MB", "one client tokens/s", "clients", "requests", "tokens/s")
    return table((*head, "request ms p50", "p95"), lines)


def decode(rows: Rows) -> str:
    keys = ("device_name", "instructions", "network", "dtype", "weights", "graph")
    latest = last([row for row in rows if row["kind"] == "decode" and "per_s" in row], *keys)
    lines = (
        (
            record.device_text(row),
            key[2],
            SHORT[key[3]],
            row.get("weights", "-"),
            "graph" if row.get("graph") else "-",
            row.get("first_ms", "-"),
            row["per_s"],
            mb(row["nbytes"]),
        )
        for key, row in sorted(latest.items())
    )
    return table(("device", "model", "dtype", "weights", "step", "first ms", "tokens/s", "tensors MB"), lines)
