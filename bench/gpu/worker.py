"""Does items in a child process: `python -m bench.gpu.worker FD` reads orders from stdin and tells events to FD.

It imports everything before its first order, and touches the GPU only then: one can be started ahead of its need.
An order is a line of JSON: `step`, `items` (ids; null for all that pytest collects), `seconds`, `dry`, `blocked` (why
not, by id), `tables` (a folder to take tiles from) and the fields of `Context`. Events are lines of JSON too: `ready`,
`planned`, `start`, `row`, `end` and `finished`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.conformance import run_tests
from bench.gpu.items import Context, Failed, Item
from bench.gpu.keys import settle_keys
from bench.gpu.plan import steps

LOST = 75  # exit code: an error that no later call of CUDA survives
USED_UP = "the time of its step was used up"
Emit = Callable[[dict[str, Any]], None]


def do(item: Item, context: Context, dry: bool, emit: Emit) -> None:
    emit({"event": "start", "item": item.id})
    start, result, why = time.monotonic(), "done", ""
    try:
        for row in (item.make_up if dry else item.run)(context):
            emit({"event": "row", "item": item.id, "row": row})
    except Failed as error:
        result, why = "failed", str(error)
    except Exception as error:  # noqa: BLE001  whatever it is, the next item is worth as much
        result, why = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
    seconds = round(time.monotonic() - start, 3)
    emit({"event": "end", "item": item.id, "result": result, "why": why, "seconds": seconds})
    if result == "failed" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001  the context is lost: another process goes on
            os._exit(LOST)


def obey(order: dict[str, Any], items: dict[str, Item], emit: Emit) -> None:
    deadline = time.monotonic() + order["seconds"]
    if order["tables"]:
        os.environ["GS_TUNING_DIR"] = order["tables"]
    if order["items"] is None or order["step"] == "conformance":
        run_tests(order["items"], deadline, order["dry"], emit)
        return
    shortlist = order["shortlist"] and Path(order["shortlist"])
    context = Context(order["device"], order["number"], Path(order["folder"]), order["ceilings"], shortlist)
    for item in (items[name] for name in order["items"]):
        if why := order["blocked"].get(item.id) or (USED_UP if time.monotonic() > deadline else ""):
            emit({"event": "end", "item": item.id, "result": "skipped", "why": why, "seconds": 0.0})
        else:
            do(item, context, order["dry"], emit)
            if torch.cuda.is_initialized():
                gc.collect()
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()


def main(fd: int) -> None:
    with os.fdopen(fd, "w", buffering=1) as events:

        def emit(event: dict[str, Any]) -> None:
            events.write(json.dumps(event, default=str) + "\n")

        items = {item.id: item for step in steps() for item in step.items}
        settle_keys()
        emit({"event": "ready"})
        for line in sys.stdin:
            try:
                obey(json.loads(line), items, emit)
                emit({"event": "finished", "why": ""})
            except Exception as error:  # noqa: BLE001  the order is over, the process is not
                emit({"event": "finished", "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


if __name__ == "__main__":
    main(int(sys.argv[1]))
