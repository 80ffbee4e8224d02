"""Tabulates what was timed: calls, layers and whole networks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from bench import record
from bench.tables.cells import SHORT, Rows, last, mb, rows_of, shape_text, table


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
            dtype = SHORT.get(row["dtype"], row["dtype"])
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
        shape = shape_text(ours["shape"]), SHORT[ours["dtype"]], ours["direction"]
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
        kept = mb(step.get("saved_bytes", step.get("peak_bytes")))
        batch = {**by.get("throughput", {}), **step}.get("batch", "-")
        run = device, f"{network} {'x'.join(map(str, size))}", batch, algorithm
        weights = mb(by.get("latency", {}).get("nbytes"))
        lines.append((*run, cells["train"], kept, cells["latency"], cells["throughput"], weights))
    head = ("device", "network", "batch", "algorithm", "training step ms", "MB for backward")
    return table((*head, "one input ms", "batch ms", "weights MB"), lines)


def _against(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Writes milliseconds, and how many times as many as those of the float network."""
    if row is None:
        return "-"
    times = f" ({row['ms_p50'] / base['ms_p50']:.2f}x)" if base is not None and base is not row else ""
    return f"{row['ms_p50']:.1f}{times}"


def convolutions(rows: Rows) -> str:
    """Tabulates each network, every shape counted once: milliseconds, ratios to float32, and our slowest shapes."""
    keys = ("device_name", "instructions", "network", "batch", "layer")
    latest = last([row for row in rows if row["kind"] == "convolution"], *keys)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in latest.values():
        groups[record.device_text(row), row["network"], row["batch"]].append(row)
    lines = []
    for network, members in sorted(groups.items()):
        float32 = sum(row["ms"]["float32"] for row in members)
        cells = []
        for name in ("bfloat16", "compile", "w4", "w4 qconv2d", "w8a8"):
            timed = [row["ms"] for row in members if name in row["ms"]]
            share = sum(ms[name] for ms in timed) / sum(ms["float32"] for ms in timed) if timed else 0.0
            cells.append(f"{share:.2f}x" if timed else "-")
        slowest = [_slowest(members, name) for name in ("w4", "w8a8")]
        lines.append((*network, len(members), f"{float32:.2f}", *cells, *slowest))
    head = ("device", "network", "batch", "shapes", "fp32 ms", "bf16", "compile", "w4", "w4 by `qconv2d`", "w8a8")
    return table((*head, "slowest w4", "slowest w8a8"), lines)


def _slowest(rows: Rows, name: str) -> str:
    """Writes the largest ratio to float32, and of which shape."""
    slow = max(rows, key=lambda row: row["ms"][name] / row["ms"]["float32"])
    layer = " ".join(f"{k}={v}" for k, v in slow["layer"].items())
    return f"{slow['ms'][name] / slow['ms']['float32']:.2f}x {layer}"


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
