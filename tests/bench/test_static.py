"""Figures that need no GPU are no worse than those kept, the guard sees what is, and predictions meet measured rows."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import AotCase, distinct_launches, specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from bench import guard, layers, predict, record, static
from gs_kernels.qmatmul.counted import COUNTED
from gs_kernels.qmatmul.spec import LAYERS
from gs_kernels.qmatmul.tiles import default_rule
from gs_kernels.tuning.cost_model import Prediction
from gs_kernels.tuning.gpu_specs import CARDS

ROW = {
    "case": "op/case",
    "kernel": "_kernel",
    "target": "sm_90",
    "registers": 64,
    "instructions": 1000,
    "loop_instructions": 0,
    "spills": 0,
    "nbytes": 4096,
    "warps_per_sm": 32,
    "torch": "2.13.0",
    "triton": "3.9.0",
}


def test_no_kernel_and_no_training_step_is_worse_than_what_is_kept():
    # the other targets take minutes: `python -m bench.static --check`
    assert static.check(static.FOLDER, [CARDS["h100"]]) == []


def test_a_launch_of_the_gate_with_bounds_by_target_has_one_row_a_kernel():
    kept = record.read_rows(static.FOLDER / "kernels.jsonl")
    counts = Counter((row["case"], row["target"], row.get("kernel")) for row in kept)
    assert len(counts) > 700 and set(counts.values()) == {1}
    names = {f"{spec.name}/{case.name}" for spec in specs() for case in spec.aot}
    assert {row["case"] for row in kept} == names


def test_cases_of_one_name_are_one_launch_for_different_targets():
    hopper = AotCase("case", lambda: None, 1024, max_regs=168, targets=("sm_90",))
    others = dataclasses.replace(hopper, max_regs=255, targets=("sm_80", "sm_100"))
    (one,) = distinct_launches([hopper, others])
    assert one == dataclasses.replace(hopper, targets=("sm_90", "sm_80", "sm_100"))
    with pytest.raises(ValueError, match=r"cases named case must be one launch.*got both for sm_90; give them diff"):
        distinct_launches([hopper, dataclasses.replace(others, targets=("sm_90",))])
    with pytest.raises(ValueError, match=r"got 1024 and 512 elements"):
        distinct_launches([hopper, dataclasses.replace(others, elements=512)])


def test_the_page_is_that_of_the_rows():
    made = {name: record.read_rows(static.FOLDER / f"{name}.jsonl") for name in ("kernels", "steps", "ops", "layers")}
    assert {(row["torch"], row["triton"]) for rows in made.values() for row in rows}
    text = (static.FOLDER / "README.md").read_text()
    assert "nothing here was timed" in text
    made_with = {key: made["kernels"][0][key] for key in ("torch", "triton")}
    assert static.page(**made, made_with=made_with) == text


def test_products_are_done_the_way_that_their_machine_code_is_predicted_to_be_fastest():
    """Rules know no machine code but what they hold of it: within 2 % of the best of all tiles, in shares or alone."""
    rows = record.read_rows(static.FOLDER / "layers.jsonl")
    assert {(row["n"], row["k"]) for row in rows} == set(LAYERS)
    for kind in (("bf16", 4), ("bf16", 2), ("bf16", 1), ("bf16", 8), ("int8", 4), ("int8", 8), ("fp8", 4)):
        sizes = {row["m"] for row in rows if (row["x"], row["bits"]) == kind}
        assert sizes >= {1, 16, 64, 256, 1024, 2048}
    # above 2,048 rows floats are multiplied by a library, whatever is predicted
    few = [row for row in rows if row["m"] <= 2048]
    cells = [(row, name, row[name]) for row in few for name in layers.NAMES if row[name] is not None]
    slow = [(row["x"], row["bits"], row["n"], row["k"], row["m"], name, on) for row, name, on in cells
            if on["us"] > 1.02 * on["best_us"] or on["us"] > 1.03 * (on["other_us"] or on["us"])]  # fmt: skip
    assert len(cells) > 800 and slow == []


def test_rules_choose_what_the_rows_of_layers_say():
    for row in record.read_rows(static.FOLDER / "layers.jsonl"):
        for name in layers.NAMES:
            if row[name] is not None:
                sizes = (row[key] for key in ("m", "n", "k", "bits"))
                plan = layers.chosen(row["x"], *sizes, CARDS[name])
                got = layers.tile_name(plan), plan.shares
                assert got == (row[name]["tile"], row[name]["programs"]), (name, row)


def test_rules_know_what_machine_code_says():
    """What `COUNTED` holds, counted again for one width."""
    if static.versions()["triton"] != record.read_rows(static.FOLDER / "layers.jsonl")[0]["triton"]:
        pytest.skip("another version of Triton makes other machine code")
    for card in (CARDS["h100"], CARDS["b200"]):
        for size, codes in COUNTED[card.sm].items():
            rules = [default_rule(m, card.sm) for m in (16, 32, 64, 256)]
            plans = [plan for rule in rules for plan in (rule.plan, *rule.others)]
            plan = next(p for p in plans if (p.block_m, p.block_n, p.warps) == size and not p.dense)
            for one, known in zip((plan, *layers.shared(plan, card)[:1]), codes[4], strict=plan.crowded is False):
                got = layers.counted(one, 4, card)
                assert (got.beside, got.held) == (known.beside, known.held), (card.name, one)
                assert got.issued == pytest.approx(known.issued, abs=0.006), (card.name, one)


@pytest.mark.parametrize(
    "change, fact",
    [
        ({"registers": 73}, "registers must be at most 72, got 73, was 64"),
        ({"instructions": 1031}, "instructions must be at most 1030, got 1031"),
        ({"spills": 1}, "spills must be at most 0, got 1"),
        ({"nbytes": 4097}, "nbytes must be at most 4096, got 4097"),
        ({"warps_per_sm": 24}, "warps_per_sm must be at least 32, got 24"),
    ],
)
def test_a_figure_that_grew_is_named_with_the_command_that_accepts_it(change, fact):
    (found,) = guard.worse([ROW], [{**ROW, **change}])
    assert found == f"op/case _kernel sm_90: {fact}{found[found.index(fact) + len(fact) :]}"
    assert found.endswith("accept it with `python -m bench.static`")


@pytest.mark.parametrize(
    "change", [{}, {"registers": 72}, {"instructions": 1030}, {"instructions": 10, "warps_per_sm": 64}]
)
def test_what_is_better_or_within_the_slack_is_fine(change):
    assert guard.worse([ROW], [{**ROW, **change}]) == []


def test_a_row_that_is_gone_is_named_a_new_one_is_fine_and_other_versions_say_nothing():
    new = {**ROW, "case": "op/new"}
    (found,) = guard.worse([ROW], [new])
    assert "op/case _kernel sm_90: is kept, and is no longer there" in found
    assert guard.worse([ROW], [{**ROW, "spills": 9, "triton": "3.6.0"}]) == []


def test_the_command_checks_writes_and_says_which_figures_are_worse(monkeypatch, tmp_path, capsys):
    slow = {name: ROW[name] for name in ROW if name not in guard.VERSIONS}
    times = {"us": 1.0, "bound": "bytes", "shared_bytes": 0, "limiter": "warps", "per_element": 2.0}
    monkeypatch.setattr(static, "kernel_rows", lambda *cards, **op: iter([{**slow, **times}]))
    step = {"network": "n", "algorithm": "a", "launches": 3, "calls": 9, "saved_bytes": 10}
    monkeypatch.setattr(static, "step_rows", lambda: iter([step]))
    for name in ("ops", "layers"):
        shutil.copy(static.FOLDER / f"{name}.jsonl", tmp_path)
    where = ["--folder", str(tmp_path)]
    assert static.main(where) == 0
    assert "| op/case | sm_90 | 64 |" in (tmp_path / "README.md").read_text()
    assert static.main(["--check", *where]) == 0
    step["launches"] = 4
    assert static.main(["--check", *where]) == 1
    assert "n a: launches must be at most 3, got 4, was 3" in capsys.readouterr().out


MEASURED = {
    "kind": "op",
    "op": "fake_quant",
    "shape": {
        "x": [8192, 8192],
        "axis": 0,
        "group": 0,
        "qmin": -8,
        "qmax": 7,
        "zero": "none",
        "learned": True,
    },
    "dtype": "bfloat16",
    "direction": "fwd",
    "provider": "ours",
    "device_name": "NVIDIA H100 80GB HBM3",
    "ms_p20": 0.2,
}


def test_measured_rows_are_compared_with_their_predictions(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    others = [{"provider": "torch"}, {"device_name": "AMD EPYC"}, {"kind": "roofline"}]
    rows = [MEASURED, {**MEASURED, "ms_p20": 0.1}, *({**MEASURED, **other} for other in others)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    slow, fast = predict.compare(record.read_rows(path))
    # 4 bytes an element and the scales, at 3.35 TB/s
    least = CARDS["h100"].launch_us + (4 * 8192 * 8192 + 8 * 8192) / 3350e3
    assert slow.least_us == fast.least_us == pytest.approx(least)
    assert slow.ratio == pytest.approx(2 * fast.ratio) == pytest.approx(200 / least)
    assert predict.main([str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("fake_quant") and f"{200 / least:.2f}x" in line and "(bytes)" in line


def test_a_backward_pass_is_predicted_with_its_forward():
    forward, both = predict.compare([MEASURED, {**MEASURED, "direction": "f+b"}])
    assert both.least_us > 2 * forward.least_us


def test_files_without_rows_of_a_described_gpu_are_said(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**MEASURED, "device_name": "AMD EPYC"}) + "\n")
    assert predict.main([str(path)]) == 2
    assert "needs rows of bench.run from a GPU that is described" in capsys.readouterr().err


def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"cut\n{}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1 must be a JSON object"):
        record.read_rows(path)


def test_ops_get_a_row_per_shape_with_what_a_float_product_takes(monkeypatch):
    monkeypatch.setattr(static, "predict_op", lambda *args: [Prediction(2.0, 3.0, 1.0, 1.0, 1.0)] * 2)
    rows = list(static.op_rows(op="qmatmul"))
    assert {row["us"] for row in rows} == {10.0} and {row["bound"] for row in rows} == {"bytes"}
    (large,) = (
        row for row in rows if row["shape"]["x"] == (4096, 8192) and row["shape"]["n"] == 8192 and row["group"] == "w4"
    )
    assert large["float_us"] == pytest.approx(2 + 2 * 4096 * 8192 * 8192 / 989.4e6, rel=1e-3)
    assert dataclasses.asdict(CARDS["h100"])["name"] == large["card"]
