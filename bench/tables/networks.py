"""Tabulates networks that were trained, pruned, searched or calibrated: what is left of them, and what they weigh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench.synthesis import SCHEMES
from bench.tables.cells import Rows, last, mb, table


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


def synthesis(rows: Rows) -> str:
    """Tabulates students and calibrations without data: a row per network, data and run, of its last step."""
    measured = [row for row in rows if row["kind"] == "synthesis"]
    lines = []
    for row in last(measured, "model", "data", "loss", "width", "batch_size", "replay", "of", "seed").values():
        found = row["accuracy"]
        pairs = [(scheme, [found[f"{scheme} on {on}"] for on in ("data", "synthetic", "noise")]) for scheme in SCHEMES]
        calibrated = (" / ".join(f"{value:.2f}" for value in values) for _, values in pairs)
        images = f"{row['steps']:,} x {row['batch_size']}"
        ours = (f"{found[name]:.2f}" for name in ("float", "student", "noise"))
        lines.append((row["model"], row["data"], row["loss"], images, row.get("replay", 1), *ours, *calibrated))
    told = (f"{scheme} on data / synthetic / noise" for scheme in SCHEMES)
    head = ("network", "data", "loss", "images", "batches a step", "float", "student", "student on noise")
    return table((*head, *told), lines)


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


def photographs(rows: Rows) -> str:
    """Tabulates what is left of a network's outputs on photographs, by how it was quantized."""
    latest = last([row for row in rows if row["kind"] == "photographs" and "sqnr_db" in row], "model", "setting")
    lines = []
    for (model, setting), row in latest.items():
        beside = f" (torch: {row['torch_sqnr_db']:.1f})" if "torch_sqnr_db" in row else ""
        tops = f"{row['top1_kept']} of {row['views']}", " and ".join(f"{n} of 5" for n in row["top5_kept"])
        megabytes = mb(row["nbytes"]["converted"]), f"{row['ms']['converted'] / row['ms']['float']:.2f}x"
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
