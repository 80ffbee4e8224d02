"""Keeps what was measured in a file, a line of JSON each, so that nothing is measured twice.

A killed search goes on where it was, and another budget or another agent on the same network and data finds the scores
and the policies that were evaluated before. The first line holds a digest of these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from gs_algos.core.arguments import as_path
from gs_algos.core.files import write_atomically

FORMAT, VERSION = "golden-stick search", 1


class Journal:
    """Reads and writes the file. path: None keeps all in memory."""

    def __init__(self, path: str | os.PathLike[str] | None, digest: str, who: str) -> None:
        self.path = None if path is None else as_path(path, f"{who}: journal")
        self.who = who
        self.scores: dict[str, dict[str, float]] = {}
        self.policies: dict[str, float] = {}
        if self.path is not None:
            self._open(digest)

    def _open(self, digest: str) -> None:
        assert self.path is not None
        header = {"format": FORMAT, "version": VERSION, "digest": digest}
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise ValueError(f"{self.who}: journal must be in a folder that is there, got {self.path}")
            write_atomically(self.path, json.dumps(header).encode() + b"\n")
            return
        if self.path.is_dir():
            raise ValueError(f"{self.who}: journal must be a file, got the folder {self.path}")
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines  # a killed process leaves half a line
        rows = [self._row(number, line) for number, line in enumerate(whole, 1)]
        if not rows or rows[0].get("format") != FORMAT or rows[0].get("version") != VERSION:
            raise ValueError(f"{self.who}: {self.path} must be a journal of version {VERSION}; use another file")
        if rows[0].get("digest") != digest:
            raise ValueError(
                f"{self.who}: the journal must be of this network, these algorithms and this data, got {self.path} of "
                "others; use another file, or delete it"
            )
        for number, row in enumerate(rows[1:], 2):
            self._take(number, row)
        if len(whole) < len(lines):
            write_atomically(self.path, b"".join(whole))

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{self.who}: line {number} of {self.path} must be JSON, got {error}; delete it"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.who}: line {number} of {self.path} must be an object; delete it")
        return row

    def _take(self, number: int, row: Mapping[str, Any]) -> None:
        try:
            if "scores" in row:
                for knob, own in row["scores"].items():
                    self.scores.setdefault(knob, {}).update({value: float(score) for value, score in own.items()})
            else:
                self.policies[key_of(row["policy"])] = float(row["score"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            must = f"line {number} of {self.path} must hold scores or a policy with its score"
            raise ValueError(f"{self.who}: {must}, got {error!r}; delete it") from error

    def add_scores(self, scores: Mapping[str, Mapping[str, float]], write: bool = True) -> None:
        """Keeps scores of values: name of a knob -> value -> score."""
        for knob, own in scores.items():
            self.scores.setdefault(knob, {}).update(own)
        self._append({"scores": scores}, write)

    def add_policy(self, policy: Mapping[str, Any], score: float, seconds: float, write: bool = True) -> None:
        """Keeps the score of a whole policy."""
        self.policies[key_of(policy)] = score
        self._append({"policy": policy, "score": score, "seconds": round(seconds, 4)}, write)

    def _append(self, row: Mapping[str, Any], write: bool) -> None:
        if self.path is not None and write:
            with self.path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()


def key_of(policy: Mapping[str, Any]) -> str:
    """Returns a policy as text, whatever order it is in."""
    return json.dumps(dict(policy), sort_keys=True)
