"""Runs a headless Chromium and speaks its DevTools protocol over a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
LIMIT = 60  # seconds for an answer
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


def find() -> str | None:
    """Returns the path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """Holds a browser with one page. `events` are what the page reported since it was opened."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer
        self.buffer = b""
        self.last = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self.last:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def open(self, page: Path) -> None:
        """Loads a file and waits until it is there; events start anew."""
        if self.session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.run("document.fonts.ready.then(() => 1)")

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        """Shows the page on a screen or on paper, light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[feature])

    def width(self, pixels: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=800, deviceScaleFactor=1, mobile=pixels < 500
        )

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + LIMIT
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium did not answer for {LIMIT} seconds"
            block = os.read(self.reader, 1 << 20)
            assert block, "Chromium ended"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def chromium(path: str, profile: Path) -> Iterator[Chromium]:
    """Runs a browser, and ends it."""
    pipes = [*os.pipe(), *os.pipe()]
    to_read, writer, reader, to_write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipes)
    for fd in pipes:
        os.close(fd)

    def connect() -> None:  # Chromium reads commands from 3 and writes to 4
        os.dup2(to_read, 3)
        os.dup2(to_write, 4)

    flags = [*FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with open(profile.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [path, *flags], preexec_fn=connect, close_fds=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        for fd in (to_read, to_write):
            os.close(fd)
        browser = Chromium(reader, writer)
        try:
            yield browser
            browser.session = None
            browser.call("Browser.close")
        finally:
            for fd in (reader, writer):
                os.close(fd)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
