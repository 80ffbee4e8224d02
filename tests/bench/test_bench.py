"""Benchmarks: nothing is timed before it agrees, and rows survive an interruption."""

import json
import platform
import subprocess
import sys
import time
import weakref

import pytest
import torch

from bench import accuracy, record, roofline, run, timing
from bench.agree import agreement, step
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import Case, Cost, OpSpec, Tol

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the benchmarks refuse to run, nothing to test")


def _square(x):
    return x * x


def _off_by_one(x):
    return x * x + 1


def _broken(x):
    raise RuntimeError("no such backend")


def _make(shape, dtype, device, generator):
    return Case((torch.randn(shape["N"], dtype=dtype, device=device, generator=generator),), {}, grad_args=(0,))


def _cost(shape, dtype):
    return Cost(nbytes=2 * shape["N"] * dtype.itemsize, flops=shape["N"])


def _spec(**changes):
    made = {
        "name": "square",
        "run": _square,
        "ref": _square,
        "make": _make,
        "cost": _cost,
        "tol": {torch.float32: Tol(0, 0)},
        "grad_tol": {torch.float32: 1e-6},
        "test_shapes": ({"N": 7}, {"N": 64}),
        "bench_shapes": {"small": ({"N": 1000}, {"N": 2000})},
        "backward": True,
        "backward_cost": _cost,
    }
    return OpSpec(**{**made, **changes})


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Runs the benchmark on one spec and returns its exit code and what it wrote."""
    monkeypatch.setattr(run, "copy_bandwidth", lambda device, seconds: 10.0)
    monkeypatch.setattr(run, "product_peaks", lambda device, seconds: {"bfloat16": 0.5, "int8": 2.0})
    # compiling is torch's business and takes seconds
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def result(spec, *flags, peers=(), absent=()):
        monkeypatch.setattr(run, "specs", lambda: (spec,))
        monkeypatch.setattr(run, "peers", lambda op: dict(peers))
        monkeypatch.setattr(run, "absent", lambda op: dict(absent))
        out = tmp_path / "out.jsonl"
        code = run.main(["--device", "cpu", "--seconds", "0.001", "--out", str(out), *flags])
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    return result


def test_every_provider_gets_a_row_with_its_times_and_where_they_were_taken(rows):
    code, written = rows(_spec(), "--quick", peers={"mul": _square})
    assert code == 0
    assert [r["kind"] for r in written] == ["roofline"] + ["op"] * 8
    assert [(r["provider"], r["direction"]) for r in written[1:]] == [
        (provider, direction) for direction in ("fwd", "f+b") for provider in ("ours", "torch", "compile", "mul")
    ]
    for row in written[1:]:
        assert row["shape"] == {"N": 1000} and row["dtype"] == "float32" and row["agrees"]
        assert 0 < row["ms_min"] <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gbps"] == pytest.approx(row["nbytes"] / row["ms_p50"] / 1e6, rel=1e-2)
        assert row["peak_tflops"] == 0.5 and row["percent_of_peak"] == pytest.approx(200 * row["tflops"], abs=0.2)
        assert row["percent_of_copy"] == pytest.approx(10 * row["gbps"], abs=0.1)
        assert {"device_name", "torch", "triton", "python", "threads", "commit", "dirty", "time"} <= row.keys()
    assert [r["nbytes"] for r in written[1::4]] == [8000, 16000]


def test_a_provider_that_disagrees_is_reported_and_not_timed(rows, capsys):
    code, written = rows(_spec(), "--quick", peers={"wrong": _off_by_one})
    wrong = [r for r in written if r.get("provider") == "wrong"]
    assert code == 0 and len(wrong) == 2
    assert all(not r["agrees"] and r["mismatch"] == 1.0 and "ms_p50" not in r for r in wrong)
    assert "NOT TIMED: differs in 100" in capsys.readouterr().out


def test_a_wrong_result_of_our_own_fails_the_run(rows):
    code, written = rows(_spec(run=_off_by_one), "--quick")
    assert code == 1
    assert not any("ms_p50" in r for r in written if r.get("provider") == "ours")


def test_a_provider_that_fails_does_not_stop_the_others(rows):
    code, written = rows(_spec(), "--quick", peers={"broken": _broken, "good": _square})
    assert code == 0
    assert {r["error"] for r in written if r.get("provider") == "broken"} == {"RuntimeError: no such backend"}
    assert all("ms_p50" in r for r in written if r.get("provider") == "good")


def test_providers_that_cannot_run_here_are_said_once_with_the_reason(rows, capsys):
    code, written = rows(_spec(), "--quick", absent={"conch": "is not installed"})
    assert code == 0 and "square: conch is not timed: it is not installed" in capsys.readouterr().out
    (row,) = (r for r in written if r["kind"] == "absent")
    assert (row["op"], row["provider"], row["why"]) == ("square", "conch", "is not installed")


def test_an_error_of_any_type_is_a_row_and_not_the_end(rows):
    class OutOfResources(Exception):
        """As Triton's: no RuntimeError."""

    def greedy(x):
        raise OutOfResources("shared memory, Required: 278528")

    code, written = rows(_spec(backward=False), "--quick", peers={"greedy": greedy, "good": _square})
    assert code == 0 and written[-2]["error"] == "OutOfResources: shared memory, Required: 278528"
    assert "ms_p50" in written[-1]


def test_rows_written_before_an_interruption_stay(rows, monkeypatch, tmp_path):
    def interrupt(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows(_spec(), "--quick", peers={"interrupted": interrupt})
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line).get("provider") for line in lines] == [None, "ours", "torch", "compile"]


def test_all_shapes_run_without_quick_and_a_limit_stops_between_them(rows):
    _, written = rows(_spec(backward=False))
    assert [r["shape"]["N"] for r in written[1::3]] == [1000, 2000]


def test_a_limit_ends_the_run_with_what_was_left_out(rows, capsys):
    code, written = rows(_spec(), "--limit", "-1")
    assert code == 1 and len(written) == 1
    assert "reached before square" in capsys.readouterr().out


def test_a_quick_run_ends_within_three_minutes_unless_told_otherwise():
    assert run.parse(["--quick"]).limit == 150
    assert run.parse(["--quick", "--limit", "9"]).limit == 9
    assert run.parse([]).limit is None


@pytest.mark.parametrize("flags", [["--op", "cube"], ["--shapes", "none"], ["--dtype", "int3"]])
def test_an_unknown_choice_is_refused_with_the_known_ones(rows, capsys, flags):
    with pytest.raises(SystemExit):
        rows(_spec(), *flags)
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, full, nearly",
    [(0, True, True), (1, False, True), (2, False, False)],
    ids=["none", "one in a thousand", "two in a thousand"],
)
def test_agreement_counts_the_elements_that_differ(change, full, nearly):
    x = torch.linspace(1, 2, 1000)

    def run_changed(x):
        y = x * x
        y[:change] += 1
        return y

    got = agreement(run_changed, Case((x,), {}), [], step(_square, Case((x,), {}), []), Tol(0, 0), 1e-6)
    assert (got.full, got.nearly) == (full, nearly)
    assert got.mismatch == pytest.approx(change / 1000)


def test_a_gradient_that_is_off_is_a_disagreement():
    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 3 * ctx.saved_tensors[0] * dy

    case = Case((torch.linspace(1, 2, 100, requires_grad=True),), {}, (0,))
    dys = [torch.ones(100)]
    got = agreement(Detached.apply, case, dys, step(_square, case, dys), Tol(0, 0), 1e-6)
    assert got.mismatch == 0 and got.grad_error == pytest.approx(0.5)
    assert not got.nearly


def test_nan_agrees_with_nan_and_with_nothing_else():
    x = torch.tensor([1.0, float("nan")])
    want = step(_square, Case((x,), {}), [])
    assert agreement(_square, Case((x,), {}), [], want, Tol(0, 0), 0).full
    assert not agreement(lambda x: x.nan_to_num() ** 2, Case((x,), {}), [], want, Tol(0, 0), 0).nearly


def test_peaks_are_of_products_in_both_types(monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", {"cpu": 64})
    peaks = roofline.product_peaks("cpu", 0.001)
    assert list(peaks) == ["bfloat16", "int8"] and all(0 < peak < 100 for peak in peaks.values())


def test_ops_of_int8_are_held_to_the_peak_of_int8(rows):
    _, written = rows(_spec(name="square_int8"), "--quick")
    assert {row["peak_tflops"] for row in written[1:]} == {2.0}
    assert {key: written[0][key] for key in ("bfloat16_tflops", "int8_tflops")} == {
        "bfloat16_tflops": 0.5,
        "int8_tflops": 2.0,
    }


def test_the_copy_is_of_random_bytes(monkeypatch):
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 8000})
    seen = []
    monkeypatch.setattr(roofline, "time_calls", lambda calls, *rest: seen.extend(calls) or timing.Timing(1, 1, 1, 1, 1))
    assert roofline.copy_bandwidth("cpu") == pytest.approx(2 * 8000 / 1e6)
    assert len(seen) == 2 and seen[0]().unique().numel() == 1000


def test_an_op_is_held_to_the_peak_of_its_own_products():
    peaks = {"bfloat16": 800.0, "int8": 1500.0, "fp8": 1400.0}
    ops = ("qmatmul", "qmatmul_int8", "qconv2d_int8", "qmatmul_fp8")
    assert [roofline.peak_of(op, peaks) for op in ops] == [800.0, 1500.0, 1500.0, 1400.0]
    assert roofline.peak_of("qmatmul_fp8", {"bfloat16": 800.0, "int8": 1500.0}) == 800.0


def test_percentiles_are_taken_of_the_samples():
    got = timing.summarize([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (got.ms_min, got.ms_p20, got.ms_p50, got.ms_p80, got.samples) == (1.0, 2.0, 3.0, 5.0, 6)


@pytest.mark.parametrize("seconds, samples", [(1e-3, 3), (0.2, 5)])
def test_a_call_that_takes_long_is_made_no_more_often_than_its_samples_need(seconds, samples):
    calls = []

    def call():
        calls.append(time.sleep(0.02))

    got = timing.time_cpu(call, seconds)
    assert got.samples >= samples and (got.samples == 3) == (seconds < 0.1)
    assert len(calls) <= 2 + 3 + got.samples


def test_the_last_results_stay_alive_and_no_others():
    made = []

    def call():
        y = torch.ones(3)
        made.append(weakref.ref(y))
        return y

    kept = timing.keep_results(call, 2)
    for _ in range(5):
        kept()
    assert [one() is not None for one in made] == [False, False, False, True, True]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps freed memory by its own rules")
def test_a_process_that_keeps_freed_memory_waits_for_its_pages_once():
    program = """
import resource, sys
import torch
from bench.timing import keep_freed_memory
assert len(sys.argv) == 1 or keep_freed_memory()
pages = []
for _ in range(40):  # the first ones, which no two processes lay alike, may find no hole of their size yet
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12 << 20, dtype=torch.float32)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*pages[20:])
"""
    returned, kept = (
        [int(count) for count in subprocess.check_output([sys.executable, "-c", program, *more]).split()]
        for more in ([], ["keep"])
    )
    assert max(kept) < 100 < min(returned)


def test_a_row_is_one_line_added_to_the_file_of_its_device_day_and_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    paths = {record.append({"n": n}, kind="accuracy", device="cpu") for n in (1, 2)}
    (path,) = paths
    assert path.parent == tmp_path / record.slug(record.device_name("cpu"))
    assert [(json.loads(line)["kind"], json.loads(line)["n"]) for line in path.read_text().splitlines()] == [
        ("accuracy", 1),
        ("accuracy", 2),
    ]
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_provider_that_nobody_knows_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--without", "compile", "torhc"])
    assert "--without must name" in (said := capsys.readouterr().err) and "got torhc" in said


def test_providers_can_be_left_out(rows):
    _, written = rows(_spec(backward=False), "--quick", "--without", "compile", "torch")
    assert [r["provider"] for r in written[1:]] == ["ours"]


@pytest.mark.parametrize("option", ["--setting", "--recipe"])
def test_the_setting_of_an_accuracy_run_is_also_taken_by_its_older_name(option):
    assert accuracy.parser_of("accuracy", "").parse_args([option, "slb-w2"]).setting == "slb-w2"
