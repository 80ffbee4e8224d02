"""The run on a GPU, without one: the plan in order, every item accounted for, and what was measured kept."""

import importlib
import json
import os
import queue
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import record
from gs_kernels.runtime.dispatch import INTERPRET

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: the run on a GPU needs kernels that compile", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to time")

from bench.gpu import ceilings, contact, decoding, driver, results, sanitize, summary
from bench.gpu.account import Account
from bench.gpu.driver import Driver, Options
from bench.gpu.items import Context, Failed
from bench.gpu.plan import SECONDS, TABLE_SECONDS, Step, steps
from bench.gpu.summary import LENGTH, table
from bench.gpu.timed import Timed
from gs_algos import quantize_weights
from gs_algos.quant.packed.module import PackedFormat
from gs_kernels.aot.collect import collect_launches

gpu = importlib.import_module("bench.gpu.__main__")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The whole plan, walked once: exit code, what was printed, rows, folder."""
    folder = tmp_path_factory.mktemp("dry")
    printed = folder / "printed"
    with printed.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        code = gpu.main(["--dry-run", "--seconds", "4000", "--out", str(folder / "out")])
    return SimpleNamespace(
        code=code, printed=printed.read_text(), rows=record.read_rows(folder / "out" / "rows.jsonl"), out=folder / "out"
    )


def test_a_dry_run_does_every_step_in_order_and_accounts_for_every_item(dry):
    plan = steps()
    assert dry.code == 0
    assert [row["step"] for row in dry.rows if row["kind"] == "step"] == [step.name for step in plan]
    ends = [(row["step"], row["item"]) for row in dry.rows if row["kind"] == "item"]
    assert len(ends) == len(set(ends)) and {row["result"] for row in dry.rows if row["kind"] == "item"} == {"done"}
    known = [(step.name, item.id) for step in plan for item in step.items]
    assert [end for end in ends if end[0] != "conformance"] == known
    assert sum(step == "conformance" for step, _ in ends) > 500
    lines = {row["step"]: row["line"] for row in dry.rows if row["kind"] == "step"}
    assert lines["w4"].startswith("w4: 20 planned, 20 done, 0 failed, 0 skipped")


def test_rows_of_a_dry_run_say_that_they_are_made_up(dry):
    timed = [row for row in dry.rows if row["kind"] in ("op", "tile", "kernels", "contact", "roofline", "device")]
    assert all(row["dry"] for row in timed) and "no GPU, times are made up" in dry.printed
    ours = [row for row in timed if row["kind"] == "op" and row["provider"] == "ours"]
    assert len(ours) == sum(isinstance(item, Timed) for step in steps() for item in step.items)
    assert all(0 < row["percent_of_copy"] < 100 and 0 < row["percent_of_peak"] < 100 for row in ours)


def test_decoding_is_measured_in_bf16_and_packed_with_a_graph_and_without(dry):
    rows = [row for row in dry.rows if row["kind"] == "decode"]
    assert all(row["dry"] for row in rows)
    schemes = ["bfloat16", "int4@group:128", "int2@group:128", "int8@group:128"]
    assert [(row["weights"], row["graph"]) for row in rows] == [(w, g) for w in schemes for g in (True, False)]
    assert "decode/llama-8b int4@group:128 graph" in (dry.out / "table.txt").read_text()


def test_the_decoder_s_products_are_compiled_ahead_of_a_run():
    for item in decoding.ITEMS:
        with collect_launches("sm_90") as kernels:
            item.launch(Context("meta", 0.0, Path()))
        assert bool(kernels) == bool(item.bits)


def test_what_is_compiled_ahead_is_what_a_model_is_packed_to():
    layer = quantize_weights(torch.nn.Sequential(torch.nn.Linear(128, 4)).bfloat16(), "int4@group:128")[0]
    assert PackedFormat.of(layer.packed) == PackedFormat.of(decoding._empty(4, 4, 128))


def test_the_table_is_last_and_short_and_kept(dry):
    text = (dry.out / "table.txt").read_text()
    assert dry.printed.endswith(text) and len(text) <= LENGTH + 1
    assert "w4/qmatmul 28672x8192 m=1 w4" in text and "conformance: " in text


def test_the_plan_fits_its_seconds_and_names_each_item_once():
    plan = steps()
    assert sum(step.seconds for step in plan) + TABLE_SECONDS == SECONDS
    names = [item.id for step in plan for item in step.items]
    assert len(names) == len(set(names))
    assert [step.name for step in plan[:4]] == ["ceilings", "contact", "conformance", "w4"]
    assert len(contact.ITEMS) == 20 and contact.ITEMS[0].id == "contact/bf16-subnormals"


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cache", "nowhere"], "--cache must be a file, got nowhere"),
        (["--seconds", "0"], "--seconds must be > 0, got 0"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_argument_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", *flags])
    assert message in capsys.readouterr().err


class FakeChild:
    """Does what it is told to for each item: a row that is given, "crash", "hang", or "late" for a slow one."""

    ending = "its process ended by signal SIGSEGV"

    def __init__(self, told, events):
        self.told, self.events, self.process = told, events, SimpleNamespace(poll=lambda: None)

    def send(self, order):
        self.told.orders.append(order)
        for item in order["items"]:
            if why := order["blocked"].get(item):
                self.tell("end", item=item, result="skipped", why=why, seconds=0.0)
                continue
            self.tell("start", item=item)
            found = self.told.behaviour.pop(item, {"kind": "note"})
            if found == "crash":
                self.tell("gone")
                return
            if found in ("hang", "late"):
                return
            if found == "interrupt":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            failed = found.get("failed", "")
            if not failed:
                self.tell("row", item=item, row=found)
            self.tell("end", item=item, result="failed" if failed else "done", why=failed, seconds=0.1)
        self.tell("finished", why="")

    def tell(self, event, **more):
        self.events.put({"event": event, "child": self, **more})

    def kill(self):
        self.told.killed += 1


@pytest.fixture
def drive(monkeypatch, tmp_path, capsys):
    """Runs a driver whose children are faked: `drive(behaviour by item, items by step)`."""

    def result(behaviour, seconds=400.0, out=None, **named):
        told = SimpleNamespace(behaviour=dict(behaviour), orders=[], killed=0)

        class FakeChildren:
            def __init__(self, env, say, events, ahead):
                events.put({"event": "ready", "child": None})
                self.events, self.working = events, None

            def take(self, fresh=False):
                return FakeChild(told, self.events)

            def end(self):
                told.killed += 1

        monkeypatch.setattr(driver, "Children", FakeChildren)
        plan = [Step(name, 100.0, tuple(items)) for name, items in named.items()]
        running = Driver(plan, Options(seconds, out or tmp_path / "out", dry=True))
        code = running.run()
        told.code, told.rows, told.printed = code, running.results.rows, capsys.readouterr().out
        told.ends = {row["item"]: (row["result"], row["why"]) for row in told.rows if row["kind"] == "item"}
        return told

    return result


def item(name, op="", bits=0):
    return ceilings.Copy(name, op, bits)


def test_a_child_that_crashes_costs_its_item_and_the_rest_is_done_by_another(drive):
    told = drive({"b": "crash"}, w4=[item("a"), item("b"), item("c")])
    assert told.ends == {"a": ("done", ""), "b": ("failed", FakeChild.ending), "c": ("done", "")}
    assert [order["items"] for order in told.orders] == [["a", "b", "c"], ["c"]] and told.code == 1


def test_children_that_never_begin_end_the_step_and_not_the_run(drive, monkeypatch):
    monkeypatch.setattr(FakeChild, "send", lambda self, order: self.tell("gone"))
    told = drive({}, w4=[item("a")], conv=[item("b")])
    assert told.ends == {"a": ("skipped", FakeChild.ending), "b": ("skipped", FakeChild.ending)}


def test_an_item_that_hangs_is_stopped_and_the_next_is_done(drive, monkeypatch):
    monkeypatch.setattr(driver, "ITEM_S", 0.05)
    told = drive({"a": "hang"}, w4=[item("a"), item("b")])
    assert told.ends == {"a": ("failed", "told nothing for 0 s"), "b": ("done", "")} and told.killed == 2


def test_a_step_ends_in_time_and_the_next_begins(drive, monkeypatch):
    monkeypatch.setattr(driver, "GRACE_S", 0.0)
    start = time.monotonic()
    told = drive({"a": "late"}, seconds=0.8, w4=[item("a"), item("b")], conv=[item("c")])
    assert time.monotonic() - start < 5
    assert told.ends == {"a": ("skipped", driver.LATE), "b": ("skipped", driver.LATE), "c": ("done", "")}
    # a step has what it needs of the time that is left, in proportion
    assert told.orders[0]["seconds"] == pytest.approx(0.2, abs=0.05)


def test_an_op_that_fails_its_contact_check_is_not_timed_and_a_line_says_so(drive):
    named = {
        "contact": [item("contact/w2", "qmatmul", 2), item("contact/conv", "qconv2d")],
        "w4": [item("w4", "qmatmul", 4), item("w2", "qmatmul", 2), item("conv", "qconv2d", 4)],
    }
    told = drive({"contact/w2": {"failed": "is wrong"}, "contact/conv": {"failed": "is late"}}, **named)
    assert told.ends["w4"] == ("done", "")
    assert told.ends["w2"] == ("skipped", "contact/w2 failed: is wrong")
    assert told.ends["conv"] == ("skipped", "contact/conv failed: is late")
    assert "qmatmul with 2-bit weights is not timed: contact/w2 failed: is wrong" in told.printed


def test_an_interruption_keeps_what_was_measured_and_ends_with_the_table(drive, tmp_path):
    told = drive({"b": "interrupt"}, w4=[item("a"), item("b")], conv=[item("c")])
    assert told.code == 130 and told.ends["a"] == ("done", "")
    assert told.ends["c"] == ("skipped", "interrupted by SIGTERM")
    assert "conv: 1 planned, 0 done, 0 failed, 1 skipped" in told.printed[-400:]
    kept = record.read_rows(tmp_path / "out" / "rows.jsonl")
    assert [row["item"] for row in kept if row["kind"] == "item"] == ["a", "b", "c"]


def test_a_row_is_in_the_file_before_the_next_is_measured(drive, monkeypatch, tmp_path):
    """What a kill leaves behind."""
    seen, append = [], results.Results.append

    def noted(self, row):
        append(self, row)
        seen.append(len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()))

    monkeypatch.setattr(results.Results, "append", noted)
    drive({}, w4=[item("a")])
    assert seen == list(range(1, len(seen) + 1))


@pytest.mark.parametrize("kind", ["full", "not writable"])
def test_rows_that_cannot_be_written_are_printed(drive, tmp_path, kind):
    out = tmp_path / "place"
    if kind == "full":
        out.mkdir()
        (out / "rows.jsonl").symlink_to("/dev/full")
    else:
        out.write_text("a file, not a folder")
    told = drive({"a": {"kind": "note", "value": 7}}, out=out, w4=[item("a")])
    assert told.code == 0 and told.printed.count("bench.gpu: --out must be a folder with room, got") == 1
    assert json.loads(next(line for line in told.printed.splitlines() if '"value": 7' in line))["item"] == "a"


def test_a_gpu_of_another_kind_is_told_with_the_card_that_stands_for_it(drive):
    about = {
        "kind": "device",
        "device_name": "NVIDIA L40S",
        "sm": 89,
        "sm_count": 142,
        "torch": "2.11",
        "triton": "3.6",
    }
    about |= {"commit": "abc", "dirty": False, "card": "NVIDIA A100 SXM4 80GB"}
    about["sheet"] = {"copy_gbps": 2039.0, "bfloat16_tflops": 312.0}
    named = {"ceilings": [item("device"), item("copy")], "w4": [item("a")]}
    told = drive({"device": about, "copy": {"kind": "roofline", "copy_gbps": 700.0}}, **named)
    assert "NVIDIA L40S: sm_89, 142 SMs, torch 2.11, triton 3.6, commit abc" in told.printed
    assert "what was measured (copy_gbps 700); of the sheet of NVIDIA A100 SXM4 80GB: bfloat16_tflops" in told.printed
    assert told.orders[-1]["ceilings"] == {"copy_gbps": 700.0, "bfloat16_tflops": 312.0}


def test_what_the_cache_has_is_counted_and_said(tmp_path, capsys):
    running = Driver([], Options(10.0, tmp_path, dry=True))
    counted = {"event": "counted", "hits": 0, "misses": 7, "launchers": 0, "failed": {}, "seconds": 3.1}
    compiled = {"event": "compiled", "made": 6, "failed": ["_kernel: no"], "seconds": 9.0}
    running._note_counts(SimpleNamespace(stdout=["a warning\n", json.dumps(counted), json.dumps(compiled)]))
    said = capsys.readouterr().out
    assert "cache: 0 kernels hit, 7 miss, 0 launchers there, counted in 3.1 s; compiling those on all cores" in said
    assert "cache: 6 kernels compiled, 1 failed, 9.0 s" in said and "a warning" not in said


def test_a_chip_that_flushes_subnormals_is_told_from_one_that_is_wrong(monkeypatch):
    check = contact.ITEMS[0]
    context = Context("cpu", 0.05, None)
    assert [row["agrees"] for row in check.run(context)] == [True] * 3
    right = contact.qmatmul
    monkeypatch.setattr(contact, "qmatmul", lambda x, w: right(x, w) * 1.5)
    with pytest.raises(Failed, match="4-bit weights differ by up to"):
        list(check.run(context))
    flushed = lambda x, w: right(x, contact.replace(w, codes=torch.zeros_like(w.codes)))  # noqa: E731
    monkeypatch.setattr(contact, "qmatmul", flushed)
    with pytest.raises(Failed, match="subnormal bf16 numbers are flushed to 0: all 4-bit codes came out as 0"):
        list(check.run(context))


def test_a_check_that_disagrees_fails_and_says_where(monkeypatch):
    check = next(one for one in contact.ITEMS if one.id == "contact/observe")
    wrong = [SimpleNamespace(**{**vars(s), "run": lambda x, **k: (x * 0, x * 0)}) for s in contact.specs()]
    monkeypatch.setattr(contact, "specs", lambda: wrong)
    with pytest.raises(Failed, match=r"differs from its reference: x=\(\): 100.00% of elements"):
        list(check.run(Context("cpu", 0.05, None)))


def test_a_table_that_is_too_long_says_how_much_is_left_out():
    about = {"kind": "op", "op": "qmatmul", "direction": "fwd", "agrees": True, "shape": {"x": [1, 8], "n": 4}}
    rows = [{**about, "item": f"w4/{i}", "provider": "ours", "ms_p20": 0.01} for i in range(500)]
    rows += [{**rows[0], "provider": "float_linear", "ms_p20": 0.03}]
    bad = Account("conv", ["x"], {f"conv/{i}": ("failed", "why " * 100) for i in range(50)})
    text = table(["head"], rows, [bad], "where")
    assert len(text) <= LENGTH and text.endswith("where") and "and 38 more" in text
    assert "3.00x" in text and "more lines in rows.jsonl" in text


def test_ours_is_set_beside_the_float_call_of_the_same_sizes_of_another_op():
    shape = {"x": [64, 8], "n": 4, "bits": 4}
    known = {"kind": "op", "direction": "fwd", "agrees": True}
    float_row = {**known, "item": "w4/a", "op": "qmatmul", "shape": shape, "provider": "float_linear", "ms_p20": 0.02}
    int8_row = {**known, "item": "w4a8/b", "op": "qmatmul_int8", "shape": {**shape, "bits": 8}, "provider": "ours"}
    (line,) = summary.timed_lines([float_row, {**int8_row, "ms_p20": 0.01, "graph": False}])
    assert line.split() == ["w4a8/b", "10.0", "20.0", "2.00x", "-", "-", "no", "graph"]


def test_small_shapes_call_every_op_forward_and_backward(capsys, monkeypatch):
    spec = next(spec for spec in sanitize.specs() if spec.name == "fake_quant")
    monkeypatch.setattr(sanitize, "specs", lambda: (spec,))
    assert sanitize.run_small_shapes("cpu") == 0
    assert capsys.readouterr().out.startswith(f"{len(spec.test_shapes)} calls")


def test_the_commit_is_taken_from_the_environment_where_there_is_no_git(monkeypatch):
    monkeypatch.setattr(record, "_git", lambda *args: "")
    monkeypatch.setenv("GS_COMMIT", "0123abcd")
    record._code.cache_clear()
    try:
        assert record.environment("cpu")["commit"] == "0123abcd"
    finally:
        record._code.cache_clear()


def test_lines_of_a_child_that_is_cut_off_are_left_out():
    from bench.gpu.children import Child

    child, events = object.__new__(Child), queue.Queue()
    child.events = events
    inside, outside = os.pipe()
    os.write(outside, b'{"event": "start", "item": "a"}\n{"event": "ro')
    os.close(outside)
    child._listen(inside)
    assert [events.get_nowait()["event"] for _ in range(2)] == ["start", "gone"]
