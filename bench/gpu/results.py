"""Writes rows to `rows.jsonl` and `log.txt` in a folder, each line at once; to the screen once the folder fails."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Keeps rows in memory and in the folder. What can no longer be written is printed, so that it is not lost."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[Row] = []
        self.folder, self.broken = folder, ""
        self.lock = threading.Lock()
        with self._guarded("rows.jsonl"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "rows.jsonl").open("a").close()

    def append(self, row: Row) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = {"time": now, **row}
        self.rows.append(row)
        text = json.dumps(row, default=str)
        if not self.broken:
            with self._guarded("rows.jsonl"), (self.folder / "rows.jsonl").open("a") as file:
                file.write(text + "\n")
        if self.broken:
            print(text, flush=True)

    def say(self, line: str, screen: bool = True) -> None:
        """Writes a line to the log, and to the screen."""
        with self.lock:
            if screen:
                print(line, flush=True)
            with contextlib.suppress(OSError), (self.folder / "log.txt").open("a") as file:
                file.write(line + "\n")

    def write(self, name: str, text: str) -> None:
        with self._guarded(name):
            (self.folder / name).write_text(text)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Any:
        try:
            yield
        except OSError as error:
            if not self.broken:
                self.broken = error.strerror or str(error)
                print(
                    f"bench.gpu: --out must be a folder with room, got {self.folder / name}: {self.broken}; "
                    "from here on rows are printed",
                    flush=True,
                )
