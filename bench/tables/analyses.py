"""Tabulates scores of layers, tools that analyse them, and what advice predicted."""

from __future__ import annotations

from bench.tables.cells import Rows, last, table


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
