"""Runs child processes: one that works, and one that has imported everything and waits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GONE = {"event": "gone"}
Event = dict[str, Any]


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a child: output at once, and no options for a pytest that is not ours."""
    left_out = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **more}


class Child:
    """Runs a process of `bench.gpu.worker`. events: what it tells, then `GONE`; what it prints goes to `say`."""

    def __init__(self, env: Mapping[str, str], say: Callable[[str], None], events: queue.Queue[Event]) -> None:
        self.events = events
        inside, outside = os.pipe()
        argv = [sys.executable, "-m", "bench.gpu.worker", str(outside)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=dict(env),
            text=True,
            errors="replace",
            pass_fds=(outside,),
            start_new_session=True,
            **pipes,
        )
        os.close(outside)
        threading.Thread(target=self._listen, args=(inside,), daemon=True).start()
        threading.Thread(target=self._copy, args=(say,), daemon=True).start()

    def _listen(self, fd: int) -> None:
        with os.fdopen(fd, errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:  # cut off by its end
                    continue
                self.events.put({**event, "child": self})
        self.events.put({**GONE, "child": self})

    def _copy(self, say: Callable[[str], None]) -> None:
        for line in self.process.stdout or ():
            say(line.rstrip("\n"))

    def send(self, order: Event) -> None:
        """Raises BrokenPipeError if the child has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def ending(self) -> str:
        code = self.process.wait()
        return (
            f"its process ended by signal {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with {code}"
        )


class Children:
    """Hands out the child that works. ahead: whether another is always on its way."""

    def __init__(
        self, env: Mapping[str, str], say: Callable[[str], None], events: queue.Queue[Event], ahead: bool = True
    ) -> None:
        self.start, self.ahead = lambda: Child(env, say, events), ahead
        self.working: Child | None = None
        self.spare: Child | None = self.start()

    def take(self, fresh: bool = False) -> Child:
        if fresh or self.working is None or self.working.process.poll() is not None:
            if self.working is not None:
                self.working.kill()
            self.working, self.spare = self.spare or self.start(), self.start() if self.ahead else None
        return self.working

    def end(self) -> None:
        for child in filter(None, (self.working, self.spare)):
            child.kill()
