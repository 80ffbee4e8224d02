"""`python -m bench.plot FILE...`: draws measured rows, beside the rows: roofline.png and speedup.png.

The roofline shows every timed call of ours by its operations per byte, under the copy bandwidth and the peak of bf16
products that were measured in the same run. The other shows how many times a float product's speed a packed one has,
over the rows of x, a line per bit width. Needs matplotlib: `pip install -e ".[report]"`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.tables.cells import rows_of
from gs_algos.core.files import whole_file


def roofline_points(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Returns (operations per byte, TFLOP/s) of our timed calls, by op."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.get("kind") == "op" and row["provider"] == "ours" and row.get("nbytes") and row.get("tflops"):
            flops = row["tflops"] * row["ms_p50"] * 1e9
            points[row["op"]].append((flops / row["nbytes"], row["tflops"]))
    return dict(points)


def speedups(rows: Iterable[dict[str, Any]], peer: str = "float_linear") -> dict[tuple[str, int], dict[int, float]]:
    """Returns (layer, bits) -> rows of x -> how many times the peer's speed, where one run timed both."""
    times: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.get("kind") == "op" and row["op"] == "qmatmul" and "ms_p20" in row:
            shape = row["shape"]
            layer = f"{shape['n']}x{shape['x'][-1]}"
            times[layer, shape["bits"], rows_of(shape), row["dtype"]][row["provider"]] = row["ms_p20"]
    ratios: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for (layer, bits, m, _), by_provider in sorted(times.items()):
        if "ours" in by_provider and peer in by_provider:
            ratios[layer, bits][m] = by_provider[peer] / by_provider["ours"]
    return dict(ratios)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError('bench.plot: needs matplotlib; pip install -e ".[report]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_roofline(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    points = roofline_points(rows)
    for op, members in points.items():
        axes.scatter(*zip(*members, strict=True), s=18, label=op)
    copy = max(row["copy_gbps"] for row in rows if "copy_gbps" in row)
    reach = [x for members in points.values() for x, _ in members]
    ends = min(reach) / 2, max(reach) * 2
    peak = max((row["bfloat16_tflops"] for row in rows if "bfloat16_tflops" in row), default=None)
    xs = [ends[0] * (ends[1] / ends[0]) ** (i / 100) for i in range(101)]
    roof = [min(x * copy / 1e3, peak) if peak else x * copy / 1e3 for x in xs]
    axes.plot(
        xs, roof, color="black", linewidth=1, label=f"copy {copy:.0f} GB/s" + (f", {peak} TFLOP/s" if peak else "")
    )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=title)
    axes.legend(fontsize="small")
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=120)
    pyplot.close(figure)


def plot_speedup(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Draws packed products against float ones; returns False, and draws nothing, if no pair was timed."""
    ratios = speedups(rows)
    if not ratios:
        return False
    pyplot = _pyplot()
    layers = sorted({layer for layer, _ in ratios})
    figure, grid = pyplot.subplots(
        1, len(layers), figsize=(1 + 4 * len(layers), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, layer in zip(grid[0], layers, strict=True):
        for (name, bits), line in ratios.items():
            if name == layer:
                axes.plot(list(line), list(line.values()), marker="o", label=f"{bits} bit")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", xlabel="rows of x", title=layer)
        axes.legend(fontsize="small")
    grid[0][0].set_ylabel("times the speed of a float product")
    figure.suptitle(title)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=120)
    pyplot.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="rows of bench.run")
    parser.add_argument("--out", type=Path, help="folder; default: that of the rows")
    chosen = parser.parse_args(argv)
    devices: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in chosen.files:
        for row in record.read_rows(path):
            devices[str(row.get("device_name"))].append(row)
    made = 0
    for name, rows in devices.items():
        if not roofline_points(rows):
            continue
        folder = (chosen.out or chosen.files[0].parent) / ("" if len(devices) == 1 else record.slug(name))
        folder.mkdir(parents=True, exist_ok=True)
        plot_roofline(rows, name, folder / "roofline.png")
        made += 1 + plot_speedup(rows, name, folder / "speedup.png")
        print(f"{name} -> {folder}")
    if not made:
        print("bench.plot: needs rows of bench.run with times of ours, got none", file=sys.stderr)
    return 0 if made else 2


if __name__ == "__main__":
    sys.exit(main())
