"""Works through the plan: gives steps to child processes, ends each in time, writes what they tell, and sums it up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import archive
from bench.gpu.account import Account
from bench.gpu.ceilings import sheet_of
from bench.gpu.children import ROOT, Child, Children, Event, environment
from bench.gpu.plan import SECONDS, TABLE_SECONDS, Step
from bench.gpu.results import Results
from bench.gpu.summary import table
from gs_kernels.tuning.gpu_specs import card_for

NUMBER_S = 0.05  # that one number is measured for
ITEM_S = 60.0  # an item that tells nothing for so long hangs
GRACE_S = 2.0  # for the item that runs when the time of its step is up
LATE = "was still running when the time of its step was up"
TRIES = 3  # children that end before they have begun an item
HUNG_S = 10.0  # an item that ran so long when its step's time was up is not tried again in another step
IMPORT_S = 90.0  # the first child has, before the plan begins
TRITON_CACHE, TABLES = "triton", "tables"  # folders in that of the results


@dataclass(frozen=True)
class Options:
    """seconds: for everything. out: folder of results. cache, shortlist: files that were made without a GPU."""

    seconds: float
    out: Path
    dry: bool = False
    cache: Path | None = None
    shortlist: Path | None = None
    target: str = "sm_90"


class Driver:
    def __init__(self, plan: Sequence[Step], options: Options) -> None:
        self.plan, self.options = plan, options
        self.start = time.monotonic()
        self.events: queue.Queue[Event] = queue.Queue()
        self.results = Results(options.out)
        self.accounts: list[Account] = []
        self.ceilings: dict[str, float] = {}
        self.head: list[str] = []
        self.refused: list[tuple[str, int, str]] = []  # op, bits and why, by contact checks
        self.stopped = ""
        self.counting: subprocess.Popen[str] | None = None
        self.sheet: dict[str, Any] = {}
        self.began = 0.0  # when the running item did

    def say(self, line: str, screen: bool = True) -> None:
        self.results.say(line, screen)

    def run(self) -> int:
        """Returns the exit code: 0 if nothing failed, 1 if an item did, 130 if it was interrupted."""
        more = self._cache()
        if self.options.dry:
            more["GS_BACKEND"] = "ref"  # the C++ of the CPU path is not what is tried here
        log = lambda line: self.say(line, screen=False)  # noqa: E731
        children = Children(environment(**more), log, self.events, ahead=not self.options.dry)
        try:
            with self._signals():
                self._count(more)
                self._await_first()
                until = time.monotonic()
                left = max(0.0, self.start + self.options.seconds - until)
                for step in self.plan:
                    until += step.seconds * left / SECONDS
                    self._do(step, until, children)
        finally:
            children.end()
            if self.counting is not None:
                _kill(self.counting)
            self._sum_up()
        failed = any(account.counts["failed"] for account in self.accounts)
        return 130 if self.stopped else int(failed)

    def _cache(self) -> dict[str, str]:
        """Unpacks the cache that was brought along; returns what children must have in their environment."""
        folder = (self.options.out / TRITON_CACHE).absolute()
        if self.options.cache is None:
            self._head("cache: none was given (--cache): kernels are compiled at their first use")
            return {} if self.options.dry else {"TRITON_CACHE_DIR": str(folder)}
        try:
            made = archive.unpack(self.options.cache, folder)
        except (OSError, ValueError) as error:
            self._head(f"cache: {error}; kernels are compiled here")
            return {"TRITON_CACHE_DIR": str(folder)}
        names = ("triton", "python", "target", "commit", "kernels", "launchers")
        self.results.append({"kind": "cache", **made})
        self._head("cache: made with " + ", ".join(f"{name} {made.get(name)}" for name in names))
        return {"TRITON_CACHE_DIR": str(folder)}

    def _head(self, line: str) -> None:
        self.head.append(line)
        self.say(line)

    def _count(self, more: dict[str, str]) -> None:
        """Starts the process that counts what the cache has, and compiles the rest beside the first steps."""
        if self.options.cache is None and self.options.dry:
            return
        shortlist = "" if self.options.shortlist is None else str(self.options.shortlist.absolute())
        how = "count" if self.options.dry else "compile"
        argv = [sys.executable, "-m", "bench.gpu.precompile", self.options.target, shortlist, how]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.counting = subprocess.Popen(argv, cwd=ROOT, env=environment(**more), start_new_session=True, **pipes)
        threading.Thread(target=self._note_counts, args=(self.counting,), daemon=True).start()

    def _note_counts(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                self.say(line.rstrip("\n"), screen=False)
                continue
            self.results.append({"kind": "cache", **event})
            if event["event"] == "counted":
                ending = "" if event["misses"] == 0 else "; compiling those on all cores"
                self._head(
                    f"cache: {event['hits']} kernels hit, {event['misses']} miss, {event['launchers']} launchers "
                    f"there, counted in {event['seconds']} s{ending}"
                )
            else:
                self._head(
                    f"cache: {event['made']} kernels compiled, {len(event['failed'])} failed, {event['seconds']} s"
                )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            self.stopped = f"interrupted by {signal.Signals(number).name}"
            self.events.put({"event": "stop"})

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _order(self, step: Step, account: Account, until: float) -> Event:
        blocked = {item.id: why for item in step.items if (why := self._why_not(item.op, item.bits))}
        shortlist, tables = self.options.shortlist, self.options.out.absolute() / TABLES
        return {
            "step": step.name,
            "items": account.left,
            "seconds": max(0.0, until - time.monotonic()),
            "dry": self.options.dry,
            "blocked": {} if step.name == "contact" else blocked,
            "device": "cpu" if self.options.dry else "cuda",
            "number": NUMBER_S,
            "folder": str(tables),
            "tables": str(tables) if step.fresh and tables.is_dir() else "",
            "ceilings": self.ceilings,
            "shortlist": None if shortlist is None else str(shortlist.absolute()),
        }

    def _why_not(self, op: str, bits: int) -> str:
        return next((why for o, b, why in self.refused if o == op and (0 in (b, bits) or b == bits)), "")

    def _do(self, step: Step, until: float, children: Children) -> None:
        account = Account(step.name, None if step.tests else [item.id for item in step.items])
        self.accounts.append(account)
        start, tries, fresh = time.monotonic(), 0, step.fresh and not self.options.dry
        self.say(f"== {step.name}: {until - start:.0f} s")
        while account.left != [] and not self.stopped and time.monotonic() < until and tries < TRIES:
            ended = len(account.ends)
            child = children.take(fresh)
            fresh, why = False, self._follow(child, self._order(step, account, until), account, until)
            if why == "finished":
                break
            child.kill()
            if account.running:
                late = why == LATE and time.monotonic() - self.began < HUNG_S
                self._end(account, account.running, "skipped" if late else "failed", why)
            tries = tries + 1 if len(account.ends) == ended else 0
            account.why = why
        reason = self.stopped or account.why or "the time of its step was used up"
        for item in account.left or ():
            self._end(account, item, "skipped", reason)
        if account.planned is None and not account.why:
            account.why = reason
        account.seconds = time.monotonic() - start
        if step.name == "contact":
            self._refuse(step, account)
        if step.name == "ceilings":
            self._describe()
        self.results.append({"kind": "step", "step": step.name, **account.counts, "line": account.line})
        self.say(account.line)

    def _follow(self, child: Child, order: Event, account: Account, until: float) -> str:
        """Notes what a child tells of an order; returns "finished", or why it went no further."""
        try:
            child.send(order)
        except BrokenPipeError:
            return child.ending
        heard = time.monotonic()
        while True:
            now = time.monotonic()
            if now > until + GRACE_S:
                return LATE
            if now > heard + ITEM_S:
                return f"told nothing for {ITEM_S:.0f} s"
            try:
                event = self.events.get(timeout=max(0.01, min(until + GRACE_S, heard + ITEM_S) - now))
            except queue.Empty:
                continue
            if event["event"] == "stop":
                return self.stopped
            if event.pop("child") is not child:
                continue
            heard = time.monotonic()
            if event["event"] == "gone":
                return child.ending
            if event["event"] == "finished":
                account.why = event["why"]
                return "finished"
            self._note(event, account)

    def _note(self, event: Event, account: Account) -> None:
        kind = event["event"]
        if kind == "planned" and account.planned is None:
            account.planned = event["items"]
        elif kind == "start":
            account.running, self.began = event["item"], time.monotonic()
        elif kind == "row":
            row = {**event["row"], "step": account.step, "item": event["item"]}
            self.results.append({**row, "dry": True} if self.options.dry else row)
            self._use(row)
        elif kind == "end":
            self._end(account, event["item"], event["result"], event["why"], event["seconds"])

    def _end(self, account: Account, item: str, result: str, why: str, seconds: float = 0.0) -> None:
        account.ends[item], account.running = (result, why), ""
        about = {"kind": "item", "step": account.step, "item": item, "result": result, "why": why, "seconds": seconds}
        self.results.append(about)
        if result == "failed":
            self.say(f"{item}: failed: {why}")

    def _use(self, row: dict[str, Any]) -> None:
        if row["kind"] == "device":
            self.sheet = row
        if row["kind"] == "roofline":
            self.ceilings |= {k: v for k, v in row.items() if k.endswith(("_gbps", "_tflops"))}
        if row["kind"] == "op" and row["provider"] == "ours" and "ms_p20" in row:
            self.say(f"{row['item']}: {1e3 * row['ms_p20']:.1f} us")

    def _await_first(self) -> None:
        """Waits until a child has imported everything: the steps share what is left then."""
        until = self.start + min(IMPORT_S, self.options.seconds / 2)
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=left)
                if event["event"] != "gone":
                    return
                self.say(f"the first child failed: {event['child'].ending}; see the log")
                self.events.put(event)
                return

    def _describe(self) -> None:
        sheet = self.sheet
        if not sheet:
            card = card_for("", int(self.options.target.removeprefix("sm_")))
            self.ceilings = {**sheet_of(card)["sheet"], **self.ceilings}
            self._head(f"device: its name could not be read: percentages are of the sheet of {card.name}")
            return
        missing = {name: value for name, value in sheet["sheet"].items() if name not in self.ceilings}
        self.ceilings |= missing
        measured = ", ".join(f"{name} {value:g}" for name, value in self.ceilings.items() if name not in missing)
        sheets = ", ".join(missing) or "nothing"
        commit = f"commit {sheet['commit']}{' with changes' if sheet['dirty'] else ''}"
        self._head(
            f"{sheet['device_name']}: sm_{sheet['sm']}, {sheet['sm_count']} SMs, torch {sheet['torch']}, "
            f"triton {sheet['triton']}, {commit}"
        )
        self._head(f"percentages are of what was measured ({measured}); of the sheet of {sheet['card']}: {sheets}")

    def _refuse(self, step: Step, account: Account) -> None:
        for item in step.items:
            result, why = account.ends.get(item.id, ("", ""))
            if result == "failed":
                self.refused.append((item.op, item.bits, f"{item.id} failed: {why}"))
                what = f"{item.op} with {item.bits}-bit weights" if item.bits else item.op
                self._head(f"{what} is not timed: {item.id} failed: {why[:150]}")

    def _sum_up(self) -> None:
        for step in self.plan[len(self.accounts) :]:
            account = Account(step.name, [item.id for item in step.items], why=self.stopped)
            self.accounts.append(account)
            for item in account.planned or ():
                self._end(account, item, "skipped", self.stopped or "the run ended before")
        where = f"{time.monotonic() - self.start:.0f} s; rows, log and table are in {self.options.out}"
        if self.results.broken:
            where = f"{time.monotonic() - self.start:.0f} s; rows were printed: {self.results.broken}"
        text = table(self.head, self.results.rows, self.accounts, where)
        self.results.write("table.txt", text + "\n")
        print("\n" + text, flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


assert TABLE_SECONDS < SECONDS
