"""Tables of tiles and the tuner: what is read is checked, what is missing gets the nearest, the fastest runs."""

import dataclasses
import json
from collections import Counter

import pytest

from gs_kernels.dispatch import INTERPRET
from gs_kernels.qmatmul.tiles import DENSE as DENSE_PLAN
from gs_kernels.qmatmul.tiles import choose_plan, tuned_rules
from gs_kernels.tuning import tables
from gs_kernels.tuning.tables import Entry, Table, find_table, nearest, read_table, write_table

TILE = {
    "dense": False,
    "scale_parts": True,
    "block_m": 16,
    "block_n": 64,
    "warps": 4,
    "stages": 3,
    "programs": 0,
}
DENSE = {**TILE, "dense": True}


def entry(m, n=4096, k=4096, bits=4, **tile):
    return Entry({"m": m, "n": n, "k": k, "bits": bits}, {**TILE, **tile}, 1.5)


def table(*entries, sm=90, sm_count=132, gpu="A GPU"):
    return Table(gpu, sm, sm_count, {"torch": "1"}, {"qmatmul": entries})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables are read from here, and forgotten afterwards."""
    monkeypatch.setenv("GS_TUNING_DIR", str(tmp_path))
    find_table.cache_clear()
    tuned_rules.cache_clear()
    yield tmp_path
    find_table.cache_clear()
    tuned_rules.cache_clear()


def plan(m, n=4096, k=4096, bits=4, sm=90, **more):
    known = {"x_bits": 16, "levels": False, "sm": sm, "sm_count": 132}
    return choose_plan(m, n, k, bits, **{**known, **more})


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    wanted = table(entry(1), entry(16, dense=True))
    write_table(path, wanted)
    assert read_table(path) == wanted
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format=2), "must have format 1, got 2; tune again"),
        (lambda d: d.pop("sm"), r"must be a table of tiles, got KeyError\('sm'\)"),
        (lambda d: d["ops"].update(conv=[{}]), "op must be one of qmatmul, got 'conv'"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].update(block_n=100), r"block_n must be one of \[32, 64, 128, 256\]"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].update(dense=1), r"entry 0 of qmatmul: dense must be one of"),
        (lambda d: d["ops"]["qmatmul"][0]["tile"].pop("warps"), "tile must have dense, scale_parts, block_m"),
        (lambda d: d["ops"]["qmatmul"][0]["problem"].update(m=0), "problem must have m, n, k, bits, all > 0"),
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

    def near(n, k=4096, bits=4):
        return [
            (end, e.problem["n"], e.problem["m"])
            for end, e in nearest(found, "qmatmul", "m", {"bits": bits}, {"n": n, "k": k})
        ]

    assert near(5000) == [(4, 4096, 1), (64, 4096, 16), (tables.LAST, 4096, 256)]
    assert near(10_000) == [(tables.LAST, 8192, 7)]
    assert near(12_288) == [(tables.LAST, 14336, 7)]
    assert near(100, bits=2) == [(tables.LAST, 4096, 3)]
    assert near(4096, bits=8) == []
    # as near to 4096 as to 8192: the smaller
    assert (
        nearest(table(entry(1, n=8192), entry(1, n=2048)), "qmatmul", "m", {"bits": 4}, {"n": 4096, "k": 4096})[0][
            1
        ].problem["n"]
        == 2048
    )


def test_products_run_with_the_tile_of_the_table(folder):
    before = plan(16)
    write_table(folder / "a.json", table(entry(16, block_n=256, warps=8), entry(256, dense=True), entry(16, bits=2)))
    write_table(folder / "b.json", table(entry(16, block_n=32), sm=80))
    find_table.cache_clear()
    tuned_rules.cache_clear()
    got = plan(16)
    assert (got.block_n, got.warps, got.split_k) == (256, 8, 1) and got != before
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


def test_programs_of_a_tile_split_k_as_rules_do(folder):
    write_table(folder / "a.json", table(entry(16, programs=2)))
    tiles = 4096 // 64
    assert plan(16).split_k == min(2 * 132 // tiles, 4096 // 128 // 4)


def test_the_table_of_the_present_gpu_goes_before_others_like_it(folder, monkeypatch):
    write_table(folder / "a.json", table(entry(1), gpu="Other"))
    write_table(folder / "b.json", table(entry(1), gpu="Present"))
    assert find_table(90, 132).gpu == "Other"
    find_table.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(tables, "capabilities", lambda index: dataclasses.make_dataclass("C", ["name"])("Present"))
    assert find_table(90, 132).gpu == "Present"
    assert find_table(80, 108) is None


if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels.aot.compile import record_launches  # noqa: E402
from gs_kernels.aot.work import work_of  # noqa: E402
from gs_kernels.tuning import qmatmul, tuner  # noqa: E402
from gs_kernels.tuning.cards import CARDS  # noqa: E402
from gs_kernels.tuning.qmatmul import Product, Static  # noqa: E402

SMALL = [
    {**TILE, "programs": 0},
    {**TILE, "block_n": 128, "programs": 0},
    # a tile of fp32 sums that four warps cannot hold
    {**TILE, "scale_parts": False, "block_m": 256, "block_n": 256, "programs": 0},
]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(tuner, "tiles", lambda m: iter(SMALL))


@pytest.mark.parametrize("m, split", [(16, 1), (100, 4)])
def test_the_work_of_a_tile_is_what_its_launch_says(m, split):
    problem = Product(m, 1024, 2048, 4)
    x, parts = problem.operands("meta")
    plan = dataclasses.replace(problem.plan(TILE, 90, 132), split_k=split)
    with record_launches("sm_90") as launches:
        problem.run(x, parts, plan, asm=True)
    assert work_of(launches[0]) == problem.work(TILE, split)


def test_ranking_leaves_out_what_spills_and_puts_the_fastest_first(few):
    ranking = tuner.rank(Product(16, 4096, 4096, 4), Static(CARDS["h100"]))
    assert ranking.pruned == Counter({"spills": 1}) or list(ranking.pruned) == ["does not fit: shared"]
    times = [ranked.us for ranked in ranking.tiles]
    assert times == sorted(times) and times[-1] > 3 * times[0]
    assert ranking.tiles[-1].tile == qmatmul.DENSE
    # 32 or 64 tiles of y: each way to split K that differs, once
    assert len(ranking.tiles) > 3
    assert all(ranked.tile["block_m"] == 16 for ranked in ranking.tiles)


def test_a_tile_is_compiled_once_whatever_the_sizes(few):
    static = Static(CARDS["h100"])
    tuner.rank(Product(16, 4096, 4096, 4), static)
    assert static.compiled == len(SMALL)
    tuner.rank(Product(1, 512, 1024, 4), static)
    assert static.compiled == len(SMALL)


def test_the_short_list_has_few_tiles_alike_and_always_the_default_and_the_dense_product():
    problem = Product(16, 4096, 4096, 4)
    stages = [tuner.Ranked({**TILE, "stages": s, "scale_parts": p}, 1.0, 1.0) for s in (2, 3, 4) for p in (True, False)]
    others = [tuner.Ranked({**TILE, "block_n": 32}, 2.0, 1.0), tuner.Ranked(qmatmul.DENSE, 9.0, 0.0)]
    got = tuner.shortlist(tuner.Ranking(problem, (*stages, *others), Counter()), 90, 4)
    assert got[:3] == [ranked.tile for ranked in stages[:3]] and got[3] == others[0].tile
    assert got[4:] == [tuner.untuned(problem, 90), qmatmul.DENSE]
    assert tuner.untuned(problem, 90) == {**TILE, "block_n": 128, "stages": 4, "programs": 2}


@pytest.mark.parametrize("sizes", [(0, 1, 128, 4), (1, 1, 100, 4), (1, 1, 128, 3)])
def test_sizes_that_kernels_do_not_take_are_refused(sizes):
    with pytest.raises(ValueError, match="k a multiple of 128, bits 1, 2, 4 or 8"):
        Product(*sizes)


@pytest.fixture
def timed(monkeypatch):
    """A GPU that takes a microsecond for each output of a block, and says which problems it was asked for."""
    seen = []

    def measured(problem, candidates, device):
        seen.append(problem)
        return sorted((Entry(vars(problem), t, float(t["block_n"])) for t in candidates), key=lambda e: e.us)

    monkeypatch.setattr(tuner, "measure", measured)
    monkeypatch.setattr(
        tuner, "capabilities", lambda index: dataclasses.make_dataclass("C", ["name", "sm", "sm_count"])("GPU", 90, 132)
    )
    return seen


def test_tuning_writes_after_each_problem_and_goes_on_where_it_stopped(few, timed, tmp_path):
    path, problems = tmp_path / "gpu.json", [Product(16, 4096, 4096, 4), Product(1, 4096, 4096, 4)]

    def stop(done, total, what):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(problems, path, progress=stop)
    assert [e.problem["m"] for e in read_table(path).ops["qmatmul"]] == [16]
    tuner.tune(problems, path)
    assert [p.m for p in timed] == [16, 1]
    assert [(e.problem["m"], e.us) for e in read_table(path).ops["qmatmul"]] == [(1, 32.0), (16, 32.0)]


def test_a_table_of_another_gpu_is_refused_and_one_of_other_versions_made_again(few, timed, tmp_path, caplog):
    path = tmp_path / "gpu.json"
    write_table(path, table(entry(16), gpu="Other"))
    with pytest.raises(ValueError, match="must be the table of GPU, got Other"):
        tuner.tune([Product(16, 4096, 4096, 4)], path)
    write_table(path, table(entry(16), gpu="GPU"))
    tuner.tune([Product(16, 4096, 4096, 4)], path)
    assert len(timed) == 1 and "tuning all of it again" in caplog.text


def test_the_nearest_kind_ranks_for_a_gpu_without_a_description():
    assert tuner.card_for("NVIDIA L40S", 89) is CARDS["a100"]
    assert tuner.card_for("NVIDIA H200", 90) is CARDS["h100"]
    assert tuner.card_for("NVIDIA RTX 5090", 120) is CARDS["b200"]
    assert tuner.card_for("Tesla T4", 75) is CARDS["a100"]
