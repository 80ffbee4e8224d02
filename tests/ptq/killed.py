"""Calibrates tiny networks in processes that are killed: `python -m tests.ptq.killed FOLDER`, for test_resume.

Prints JSON: for each case how often it was killed, whether it ended with the bits of a calibration that was not, and
what is in the folder of its journal.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gs_algos.ptq import block_loop, journal, streams
from gs_algos.ptq.ptq import PTQ
from tests.nets.language_models import tiny_llama
from tests.ptq.test_ptq import net
from tests.ptq.test_static import outlying_vit
from tests.ptq.test_static import smooth as pictures
from tests.ptq.test_tune import correlated

KILLS, KILLED = 4, 9  # of each case; exit code
IDS = [{"input_ids": torch.randint(1, 17, (2, 8), generator=torch.Generator().manual_seed(i))} for i in range(3)]
MIXED: list[Any] = [
    ("re:blocks.0.*", {"rounding": "adaround"}),
    ("re:.*down", {"weight": "int8@channel", "rounding": "nearest"}),
    ("blocks.1.up", None),
]
CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, Any]]] = {
    "signround": (net, correlated(3), {"rounding": "signround", "steps": 4, "budget": 0}),
    "adaround": (net, correlated(3), {"rounding": "adaround", "steps": 4, "act": "int8@token"}),
    "rotate": (lambda: tiny_llama(), IDS, {"transforms": ["rotate"], "blocks": "re:.*layers.[0-9]+", "budget": 0}),
    "relayernorm": (
        outlying_vit,
        [pictures(8, seed) for seed in range(3)],
        {"weight": "int4@channel", "act": "int6@tensor", "transforms": ["relayernorm"]},
    ),
    "mixed rules": (net, correlated(3), {"rounding": "signround", "steps": 4, "rules": MIXED}),
}


class Killer:
    """Ends the process, as a kill does, at the given one of the places where something is computed or written."""

    def __init__(self) -> None:
        self.at, self.count = 0, 0
        self.watch(block_loop, "solve")
        self.watch(block_loop, "install")
        self.watch(streams.ActivationStore, "keep")
        self.watch(streams.Streams, "output_of")
        self.watch(journal, "write_atomically")
        self.watch(os, "fsync")
        self.watch(os, "replace")

    def watch(self, owner: Any, name: str) -> None:
        """Counts the calls of a function twice: before and after it."""
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        setattr(owner, name, counted)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            os._exit(KILLED)


def calibrate(case: str, journal_folder: Path) -> str:
    """Calibrates a network of the case, and returns a digest of what came of it."""
    make, data, options = CASES[case]
    algo = PTQ(**{"weight": "int4@group:8", **options})
    model = algo.apply(make(), data[0])
    algo.calibrate(model, data, journal=journal_folder)
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def killed(case: str, journal_folder: Path, killer: Killer, at: int) -> bool:
    """Calibrates in a process of its own; returns whether it was killed."""
    child = os.fork()
    if not child:
        try:
            killer.at, killer.count = at, 0
            calibrate(case, journal_folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED


def main(folder: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    draw, killer = random.Random(0), Killer()
    found = {}
    for case in CASES:
        killer.count, journal_folder = 0, folder / f"{case} killed"
        want = calibrate(case, folder / case)
        places = [draw.randint(1, killer.count // 2) for _ in range(KILLS)]
        kills = sum(killed(case, journal_folder, killer, at) for at in places)
        got = calibrate(case, journal_folder)
        found[case] = {"same": got == want, "kills": kills, "files": sorted(os.listdir(journal_folder))}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
