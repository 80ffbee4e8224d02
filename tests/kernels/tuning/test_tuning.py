"""Tables of tiles and the tuner: what is read is checked, what is missing gets the nearest, the fastest runs."""

import dataclasses
import itertools
import json
import os
import time
from collections import Counter

import pytest
import torch

from gs_kernels.fake_quant import tiles as fake_quant_tiles
from gs_kernels.fake_quant.strided_rows import BY_COL, BY_ROW, Rows
from gs_kernels.qconv2d.tiles import choose_plan as choose_conv_plan
from gs_kernels.qmatmul.tiles import DENSE as DENSE_PLAN
from gs_kernels.qmatmul.tiles import choose_int8_plan, choose_plan
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.slb import tiles as slb_tiles
from gs_kernels.tuning import tables
from gs_kernels.tuning.space import Machine, find_space, spaces
from gs_kernels.tuning.tables import Entry, Table, find_table, forced, nearest, read_table, tuned, write_table

TILE = {
    "dense": False,
    "scale_parts": True,
    "block_m": 16,
    "block_n": 64,
    "warps": 4,
    "stages": 3,
    "programs": 0,
}
DENSE_TILE = {"dense": True, "scale_parts": False, "block_m": 16, "block_n": 32, "warps": 2, "stages": 1, "programs": 0}


def entry(m, n=4096, k=4096, bits=4, **tile):
    return Entry({"m": m, "n": n, "k": k, "bits": bits}, {**TILE, **tile}, 1.5)


def table(*entries, op="qmatmul", sm=90, sm_count=132, gpu="A GPU"):
    return Table(gpu, sm, sm_count, {"torch": "1"}, {op: entries})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables are read from here, and forgotten afterwards."""
    monkeypatch.setenv("GS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "present", lambda: (90, 132))
    tables.forget()
    yield tmp_path
    tables.forget()


def plan(m, n=4096, k=4096, bits=4, sm=90, **more):
    known = {"x_bits": 16, "levels": False, "sm": sm, "sm_count": 132}
    return choose_plan(m, n, k, bits, **{**known, **more})


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    wanted = table(entry(1), entry(16, dense=True))
    write_table(path, wanted)
    assert read_table(path) == wanted
    assert list(path.parent.iterdir()) == [path]


def test_what_killed_writers_left_goes_and_what_one_writes_now_stays(tmp_path):
    path = tmp_path / "gpu.json"
    left, live, other = (tmp_path / f".{name}.json.{'0' * 15}{i}" for i, name in enumerate(("gpu", "gpu", "b")))
    for draft, age in ((left, 7200), (live, 10), (other, 7200)):
        draft.write_text("half")
        os.utime(draft, times=(time.time() - age,) * 2)
    write_table(path, table(entry(1)))
    assert sorted(tmp_path.iterdir()) == sorted([path, live, other])


def test_a_table_that_cannot_be_written_leaves_the_old_one_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    write_table(path, table(entry(1)))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device; what was there is as before") as caught:
        write_table(path, table(entry(2)))
    assert caught.value.filename == str(path) and list(tmp_path.iterdir()) == [path]
    assert read_table(path) == table(entry(1))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format=2), "must have format 1, got 2; tune again"),
        (lambda d: d.pop("sm"), r"must be a table of tiles, got KeyError\('sm'\)"),
        (lambda d: d["ops"].update(conv=[{}]), "op must be one of fake_quant, slb, .* got 'conv'"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].update(block_n=100), r"block_n must be one of \[32, 64, 128, 256\]"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].update(dense=1), r"entry 0 of qmatmul: dense must be one of"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].pop("warps"), "tile must have dense, scale_parts, block_m"),
        (lambda d: d["ops"]["qmatmul"][0]["problem"].update(m=-1), "problem must have m, n, k, bits, all >= 0"),
        (lambda d: d["ops"]["qmatmul"].append([]), "must have problem, tile and us"),
    ],
)
def test_a_table_that_is_wrong_says_where(tmp_path, change, message):
    path = tmp_path / "gpu.json"
    write_table(path, table(entry(1)))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_a_file_that_is_no_json_and_a_folder_that_is_none_are_named(tmp_path, folder, monkeypatch):
    (folder / "gpu.json").write_text("{")
    with pytest.raises(ValueError, match=r"gpu.json must be a table of tiles"):
        find_table(90, 132)
    monkeypatch.setenv("GS_TUNING_DIR", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="GS_TUNING_DIR must be a folder, got"):
        find_table(90, 132)


def test_sizes_that_are_not_in_the_table_get_the_nearest_and_rows_the_nearer_by_ratio():
    found = table(
        entry(1, n=4096), entry(16, n=4096), entry(256, n=4096), entry(7, n=8192), entry(7, n=14336), entry(3, bits=2)
    )

    def near(n, k=4096, bits=4, known=found):
        sizes = {"n": n, "k": k, "bits": bits}
        return [(end, e.problem["n"], e.problem["m"]) for end, e in nearest(known, find_space("qmatmul"), sizes)]

    assert near(5000) == [(4, 4096, 1), (64, 4096, 16), (tables.LAST, 4096, 256)]
    assert near(10_000) == [(tables.LAST, 8192, 7)]
    assert near(12_288) == [(tables.LAST, 14336, 7)]
    assert near(100, bits=2) == [(tables.LAST, 4096, 3)]
    assert near(4096, bits=8) == []
    # as near to 4096 as to 8192: the smaller
    assert near(4096, known=table(entry(1, n=8192), entry(1, n=2048))) == [(tables.LAST, 2048, 1)]


def test_products_run_with_the_tile_of_the_table(folder):
    before = plan(16)
    write_table(folder / "a.json", table(entry(16, block_n=256, warps=8), entry(256, dense=True), entry(16, bits=2)))
    write_table(folder / "b.json", table(entry(16, block_n=32), sm=80))
    tables.forget()
    got = plan(16)
    assert (got.block_n, got.warps, got.shares) == (256, 8, 0) and got != before
    assert plan(64) == got
    assert plan(65) == plan(100_000) == DENSE_PLAN
    assert plan(16, bits=2).block_n == 64
    assert plan(16, sm=80).block_n == 32
    # what was not tuned: another GPU, fp32, a table of levels
    assert (
        plan(16, sm_count=114) == choose_plan(16, 4096, 4096, 4, x_bits=16, levels=False, sm=90, sm_count=114)
        and plan(16, sm_count=114).block_n == 128
    )
    assert plan(16, x_bits=32).block_n == 64 and plan(16, levels=True).block_n == 128


@pytest.mark.parametrize("programs", [0, 1, 2, 3])
def test_programs_of_a_tile_share_k_as_rules_do(folder, programs):
    write_table(folder / "a.json", table(entry(16, programs=programs)))
    assert (plan(16).shares, plan(16).per_sm) == (132 * programs, max(programs, 1))


INT8_TILE = {"block_m": 64, "block_n": 64, "warps": 4, "stages": 3, "programs": 0}


def test_8_bit_products_run_with_the_tile_of_the_table(folder):
    problem = {"m": 64, "n": 4096, "k": 4096, "group": 0}
    write_table(folder / "a.json", table(Entry(problem, INT8_TILE, 1.0), op="qmatmul_int8"))
    tables.forget()
    got = choose_int8_plan(64, 4096, 4096, 8, 4096, points=False, fp8=False, sm=90, sm_count=132)
    assert (got.dense, got.block_m, got.block_n, got.stages, got.shares) == (False, 64, 64, 3, 0)
    groups = choose_int8_plan(64, 4096, 4096, 4, 128, points=False, fp8=False, sm=90, sm_count=132)
    assert groups.block_n == 256  # groups were not tuned


def test_stages_of_a_tile_are_as_timed_with_no_wider_weights(folder):
    tile = {**INT8_TILE, "block_n": 256, "stages": 5}
    for group, timed in ((128, 4), (0, 8)):
        problem = {"m": 64, "n": 4096, "k": 4096, "group": group}
        write_table(folder / "a.json", table(Entry(problem, tile, 1.0), op="qmatmul_int8"))
        tables.forget()
        of = {"group": group or 4096, "sm": 90, "sm_count": 132}
        stages = [choose_int8_plan(64, 4096, 4096, bits, points=False, fp8=False, **of).stages for bits in (1, 2, 4, 8)]
        assert stages == [5, 5, 5, 3 if timed == 4 else 5]


CONV = {"channels": 128, "levels": False, "sm": 90, "sm_count": 132}


def test_convolutions_run_with_the_tile_of_the_table(folder):
    problem = {"m": 3136, "n": 128, "k": 1152, "groups": 1, "channels": 128, "x_bits": 16}
    tile = {"dense": False, "scale_parts": False, **INT8_TILE, "programs": 4}
    dense = {**tile, "dense": True}
    entries = Entry(problem, tile, 1.0), Entry({**problem, "x_bits": 8}, {**tile, "stages": 2}, 1.0)
    write_table(folder / "a.json", table(*entries, Entry({**problem, "m": 10**6}, dense, 1.0), op="qconv2d"))
    tables.forget()
    got = choose_conv_plan(3136, 128, 1152, 1, x_bits=16, **CONV)
    assert (got.block_m, got.block_n, got.stages) == (64, 64, 3)
    assert got.split_k == min(4 * 132 // (49 * 2), 1152 // 128 // 4)
    assert choose_conv_plan(3136, 128, 1152, 1, x_bits=16, **CONV, splits=False).split_k == 1
    assert choose_conv_plan(10**6, 128, 1152, 1, x_bits=16, **CONV).dense
    assert choose_conv_plan(3136, 128, 1152, 1, x_bits=8, **CONV).stages == 2
    # what was not tuned: groups of a scale, fp32, channels one by one, groups of channels
    for more in ({"x_bits": 8, "int8_group": 32}, {"x_bits": 32}, {"x_bits": 16, "channels": 3}):
        assert choose_conv_plan(100, 128, 1152, 1, **{**CONV, **more}).block_m == 32
    assert choose_conv_plan(3136, 128, 1152, 2, x_bits=16, **CONV).block_n == 128


def test_passes_over_rows_and_levels_run_with_the_tile_of_the_table(folder):
    rows, cols = Rows(BY_ROW, 4096, 4096, 4096, 4096, 0, 4096), Rows(BY_COL, 4096, 4096, 4096, 4096, 0, 4096)
    before = fake_quant_tiles.choose_tile(rows), fake_quant_tiles.choose_tile(cols)
    by_row = Entry({"by": BY_ROW, "n": 1 << 24}, {"elements": 2048, "warps": 16}, 1.0)
    write_table(folder / "a.json", table(by_row, op="fake_quant"))
    tables.forget()
    assert fake_quant_tiles.choose_tile(rows) == fake_quant_tiles.Tile(1, 2048, 16) != before[0]
    assert fake_quant_tiles.choose_tile(cols) == before[1]
    # less than a whole tile
    assert fake_quant_tiles.choose_tile(dataclasses.replace(rows, rows=1, cols=100)) == fake_quant_tiles.Tile(1, 128, 4)
    mixed = Entry({"planes": 4, "itemsize": 4, "n": 1 << 20}, {"vectors": 4, "warps": 2}, 1.0)
    write_table(folder / "a.json", table(mixed, op="slb"))
    tables.forget()
    got = slb_tiles.choose_tile(512, 4608, 4, 4)
    assert (got.rows * got.cols, got.warps) == (32 * 2 * 4 * 4, 2)
    assert slb_tiles.choose_tile(512, 4608, 4, 4, vectors_max=1).warps == 4


def test_a_forced_tile_goes_before_tables_and_only_inside():
    tile = {"elements": 1024, "warps": 2}
    with forced("fake_quant", tile):
        assert tuned("fake_quant", None, 100, by=1) is tile
    assert tuned("fake_quant", None, 100, by=1) is None


def test_the_table_of_the_present_gpu_goes_before_others_like_it(folder, monkeypatch):
    write_table(folder / "a.json", table(entry(1), gpu="Other"))
    write_table(folder / "b.json", table(entry(1), gpu="Present"))
    assert find_table(90, 132).gpu == "Other"
    tables.forget()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(tables, "capabilities", lambda index: dataclasses.make_dataclass("C", ["name"])("Present"))
    assert find_table(90, 132).gpu == "Present"
    assert find_table(80, 108) is None


if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels.aot import launches_of  # noqa: E402
from gs_kernels.runtime.opspec import specs  # noqa: E402
from gs_kernels.tuning import tuner  # noqa: E402
from gs_kernels.tuning.from_machine_code import Ranked, Ranking, Static  # noqa: E402
from gs_kernels.tuning.gpu_specs import CARDS  # noqa: E402
from gs_kernels.tuning.space import FIXED  # noqa: E402

H100 = Machine(90, 132)
PROBLEMS = {
    "fake_quant": {"by": 1, "n": 1 << 20},
    "slb": {"planes": 4, "itemsize": 4, "n": 1 << 20},
    "slb_update": {"planes": 4, "itemsize": 4, "n": 1 << 20},
    "qmatmul": {"m": 16, "n": 4096, "k": 4096, "bits": 4},
    "qmatmul_int8": {"m": 16, "n": 4096, "k": 4096, "group": 128},
    "qconv2d": {"m": 3136, "n": 128, "k": 1152, "groups": 1, "channels": 128, "x_bits": 16},
}
SMALL = [
    DENSE_TILE,
    TILE,
    {**TILE, "block_n": 128},
    # a tile of fp32 sums that four warps cannot hold
    {**TILE, "scale_parts": False, "block_m": 256, "block_n": 256},
]


@pytest.fixture
def few(monkeypatch):
    """Products have few tiles."""
    known = spaces()
    space = dataclasses.replace(known["qmatmul"], candidates=lambda problem: iter(SMALL))
    monkeypatch.setitem(known, "qmatmul", space)
    return space


def test_every_kernel_of_the_gate_has_a_choice_of_tiles_or_a_reason_for_none():
    chosen = {kernel for space in spaces().values() for kernel in space.kernels}
    launched = {
        launch.compiled.name
        for spec in specs()
        for case in spec.aot
        for launch in (launches_of(case, "sm_90") if "sm_90" in case.targets else ())
    }
    assert launched <= chosen | FIXED.keys()
    assert "_qconv2d_kernel" in launched and all(FIXED.values())


@pytest.mark.parametrize("op", PROBLEMS)
def test_every_space_predicts_the_tile_that_runs_without_a_table(op):
    space, problem = spaces()[op], PROBLEMS[op]
    space.check(problem)
    default = space.default(problem, H100)
    got = Static(CARDS["h100"]).predict(space, problem, default)
    assert got.tile == default and got.us > CARDS["h100"].launch_us
    assert all(set(tile) == set(space.choices) for tile in (default, space.reference(problem, H100)))
    for tile in space.candidates(problem):
        assert all(tile[name] in values for name, values in space.choices.items())
        assert space.describe(tile)


def test_problems_of_every_space_are_in_proofs_of_it():
    assert PROBLEMS.keys() == spaces().keys()


def test_a_convolution_is_that_of_the_problem_whatever_its_filter():
    space = spaces()["qconv2d"]
    problem = {"m": 200, "n": 16, "k": 6 * 32, "groups": 2, "channels": 32, "x_bits": 16}
    x, weight = space.make(problem, "cpu")
    about = space.run.__globals__["geometry_of"](problem)
    assert (about.r, about.s, about.groups) == (2, 3, 2) and about.output(*x.shape[2:]) == tuple(x.shape[2:])
    assert x.shape[1] == 64 and 200 <= x.shape[2] * x.shape[3] < 215 and weight.codes.shape == (2, 32, 32)


def test_ranking_leaves_out_what_spills_and_puts_the_fastest_first(few):
    done = []
    ranking = Static(CARDS["h100"]).rank("qmatmul", PROBLEMS["qmatmul"], 2, lambda *about: done.append(about))
    assert ranking.pruned == Counter({"spills": 1}) or list(ranking.pruned) == ["does not fit: shared"]
    times = [ranked.us for ranked in ranking.tiles]
    assert all(a < 1.02 * b for a, b in itertools.pairwise(times)) and times[-1] > 3 * times[0]
    assert ranking.tiles[-1].tile == DENSE_TILE
    # 32 or 64 tiles of y: each way to split K that differs, once
    assert len(ranking.tiles) > 3 and len({ranked.launched for ranked in ranking.tiles}) == len(ranking.tiles)
    assert done[4] == (5, 5, "compiling for sm_90")
    assert spaces()["qmatmul"].default(PROBLEMS["qmatmul"], H100) in [ranked.tile for ranked in ranking.tiles]


def test_a_kernel_is_compiled_and_read_once_whatever_the_sizes():
    static, space, tile = Static(CARDS["h100"]), spaces()["fake_quant"], {"elements": 4096, "warps": 8}
    for n in (1 << 20, 1 << 22):
        static.predict(space, {"by": 1, "n": n}, tile)
        assert {report.kernel for report in static.reports.values()} <= set(space.kernels)
        assert len(static.reports) == 3


def test_other_processes_predict_what_this_one_does():
    problem, tile = PROBLEMS["fake_quant"], {"elements": 4096, "warps": 8}
    with tuner.compilers(CARDS["h100"], 2) as predict:
        (there,) = predict("fake_quant", problem, [tile])
    assert there == Static(CARDS["h100"]).predict(spaces()["fake_quant"], problem, tile)


def test_the_short_list_has_few_tiles_alike_and_always_the_default_and_the_reference():
    problem = PROBLEMS["qmatmul"]
    stages = [Ranked({**TILE, "stages": s, "scale_parts": p}, 1.0, 1.0) for s in (2, 3, 4) for p in (True, False)]
    others = [Ranked({**TILE, "block_n": 32}, 2.0, 1.0), Ranked(DENSE_TILE, 9.0, 0.0)]
    got = tuner.shortlist(Ranking("qmatmul", problem, (*stages, *others), Counter()), H100, 4)
    assert got[:3] == [ranked.tile for ranked in stages[:3]] and got[3] == others[0].tile
    assert got[4:] == [
        {**TILE, "block_n": 128, "stages": 4, "programs": 2},
        spaces()["qmatmul"].reference(problem, H100),
    ]


@pytest.mark.parametrize(
    "op, change, message",
    [
        ("qmatmul", {"m": 0}, "bits 1, 2, 4 or 8"),
        ("qmatmul", {"bits": 3}, "bits 1, 2, 4 or 8"),
        ("qmatmul_int8", {"group": 100}, "a multiple of 32 that divides k"),
        ("qconv2d", {"channels": 7}, "k a multiple of channels"),
        ("qconv2d", {"channels": 9}, "channels that are a multiple of 8"),
        ("fake_quant", {"by": 4}, "by 0, 1, 2 or 3"),
        ("slb", {"itemsize": 1}, "itemsize 2 or 4"),
        ("slb", {"n": -1}, "slb needs planes, itemsize, n, all >= 0"),
    ],
)
def test_sizes_that_kernels_do_not_take_are_refused(op, change, message):
    with pytest.raises(ValueError, match=message):
        spaces()[op].check({**PROBLEMS[op], **change})


@pytest.fixture
def timed(monkeypatch):
    """A GPU that takes a microsecond for each output of a block, and says which problems it was asked for."""
    seen = []

    def measured(space, problem, candidates, device, note):
        seen.append(problem)
        return sorted((Entry(problem, t, float(t["block_n"])) for t in candidates), key=lambda e: e.us)

    about = dataclasses.make_dataclass("C", ["name", "sm", "sm_count"])("GPU", 90, 132)
    monkeypatch.setattr(tuner, "measure", measured)
    monkeypatch.setattr(tuner, "capabilities", lambda index: about)
    return seen


def product(m):
    return "qmatmul", {**PROBLEMS["qmatmul"], "m": m}


def test_tuning_writes_after_each_problem_and_goes_on_where_it_stopped(few, timed, tmp_path):
    path, problems = tmp_path / "gpu.json", [product(16), product(1)]

    def stop(done, total, what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(problems, path, progress=stop)
    assert [e.problem["m"] for e in read_table(path).ops["qmatmul"]] == [16]
    tuner.tune(problems, path)
    assert [p["m"] for p in timed] == [16, 1]
    assert [(e.problem["m"], e.us) for e in read_table(path).ops["qmatmul"]] == [(1, 32.0), (16, 32.0)]


def test_a_table_of_another_gpu_is_refused_and_one_of_other_versions_made_again(few, timed, tmp_path, caplog):
    path = tmp_path / "gpu.json"
    write_table(path, table(entry(16), gpu="Other"))
    with pytest.raises(ValueError, match="must be the table of GPU, got Other"):
        tuner.tune([product(16)], path)
    write_table(path, table(entry(16), gpu="GPU"))
    tuner.tune([product(16)], path)
    assert len(timed) == 1 and "tuning all of it again" in caplog.text


def test_only_tiles_that_give_the_result_of_the_reference_are_timed(monkeypatch, caplog):
    """On a CPU, a kernel that doubles: a tile of 2 forgets to, one of 3 does not run."""
    chosen = {0: 2.0, 1: 2.0, 2: 1.0}

    def run_doubling(problem, x, machine):
        factor = chosen.get(tuned("double", H100, 1)["block"])
        if factor is None:
            raise RuntimeError("too much shared memory")
        return factor * x

    space = dataclasses.replace(
        spaces()["qmatmul"],
        op="double",
        make=lambda problem, device: torch.ones(4),
        run=run_doubling,
        reference=lambda problem, machine: {"block": 0},
    )
    monkeypatch.setattr(tuner, "capabilities", lambda index: H100)
    monkeypatch.setattr(tuner, "time_calls", lambda calls: float(calls[0]().sum()))
    found = tuner.measure(space, {"m": 1}, [{"block": n} for n in (1, 2, 3)], "cpu")
    assert [(e.tile, e.us) for e in found] == [({"block": 1}, 8.0)]
    assert "is off by 5.0e-01 of the reference" in caplog.text and "too much shared memory" in caplog.text
