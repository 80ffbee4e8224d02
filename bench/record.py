"""Records results: one JSON line each in `bench/results/<device>/<date>-<commit>.jsonl`, written at once.

    record.append({"op": "fake_quant", "ms_p50": 0.31}, kind="op")

adds what the number depends on (device, versions, commit, threads) and keeps what was written before.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gs_algos.core.machine import device_name, machine
from gs_kernels.runtime.dispatch import variable

RESULTS = Path(__file__).parent / "results"


def device_text(row: dict[str, Any]) -> str:
    """Returns the device of a row and, of a CPU, the instruction set that was used; older rows have none."""
    extra = row.get("instructions")
    return f"{row['device_name']}, {extra}" if extra else str(row["device_name"])


def slug(name: str) -> str:
    """Makes a file name of a device: `slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*args: str) -> str:
    try:
        run = subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


@cache
def _code() -> dict[str, Any]:
    # results being written do not make the code dirty
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    commit = _git("rev-parse", "--short=10", "HEAD") or variable("GS_COMMIT") or "unknown"
    return {"commit": commit, "dirty": bool(status)}


def environment(device: str) -> dict[str, Any]:
    """Returns device, versions, commit, threads: everything but the code's own arguments that a number depends on."""
    return {**machine(device), **_code()}


def default_path(device: str) -> Path:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return RESULTS / slug(device_name(device)) / f"{today}-{_code()['commit']}.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file.

    Raises:
        ValueError: if a line is not a JSON object; a last line that an interruption cut off is left out.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            if number == len(lines):
                break
            raise ValueError(f"bench.record: {path}:{number} must be a JSON object, got {error}") from error
    return rows


def append(row: dict[str, Any], kind: str, *, device: str | None = None, path: Path | None = None) -> Path:
    """Writes one line and returns the file that holds it.

    Args:
        row: what was measured. Its keys win over those of `environment`.
        kind: what a reader filters by, e.g. "op", "roofline", "accuracy".
        device: where it ran, "cuda" or "cpu"; default: "cuda" if there is one.
        path: another file.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = path or default_path(device)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"kind": kind, "time": now, **environment(device), **row}) + "\n")
    return path
