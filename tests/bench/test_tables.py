"""Tables and pictures come from rows: docs/benchmarks.md says what they say, and what lacks rows is said."""

import json

import pytest

from bench import plot, record
from bench.tables import cells, language, networks, times
from bench.tables.page import main
from gs_kernels.runtime import instructions

RUN = {"kind": "accuracy", "model": "net", "data": "set", "recipe": "w8", "seed": 0, "time": "1"}
TOPS = {"float": 90.0, "float_continued": 91.0, "trained": 92.0, "converted": 92.0}
PARITY = {"images": 1000, "differing_predictions": 1}


def product(provider, bits, m, ms, **more):
    shape = {"x": [m, 128], "n": 256, "bits": bits}
    about = {"kind": "op", "op": "qmatmul", "provider": provider, "dtype": "bfloat16", "device_name": "A GPU"}
    rate = {"nbytes": 1000 * m, "tflops": 0.5 * m, "ms_p50": ms, "copy_gbps": 100.0}
    return {**about, "shape": shape, "ms_p20": ms, **rate, **more}


PRODUCTS = [
    product("ours", 4, 1, 0.5),
    product("float_linear", 4, 1, 1.0),
    product("ours", 4, 16, 2.0),
    product("float_linear", 4, 16, 1.0),
    product("ours", 2, 1, 0.25),
    product("float_linear", 2, 1, 1.0),
    product("ours", 1, 1, 0.25),
]


def test_the_page_holds_the_tables_of_the_rows():
    assert main(["--check"]) == 0


def test_accuracy_is_the_mean_over_seeds_of_the_last_run_of_each():
    second = {**RUN, "seed": 1, "accuracy": {**TOPS, "converted": 94.0}, "parity": PARITY}
    old = {**RUN, "time": "0", "accuracy": {**TOPS, "converted": 0.0}}
    rows = [{**RUN, "accuracy": TOPS, "parity": PARITY}, old, second]
    line = networks.accuracy(rows).splitlines()[2]
    assert line == "| net | set | w8 | 2 | 90.00 | 91.00 | 92.00 | 93.00 | 2 of 2,000 |"
    pruned = {**RUN, "accuracy": {"float": 90.0, "trained": 88.0}}
    assert networks.accuracy([pruned]).splitlines()[2] == "| net | set | w8 | 1 | 90.00 | - | 88.00 | - | - |"


def test_what_pruning_takes_off_is_shown_before_and_after():
    ends = {
        "float": {
            "numbers": 3e6,
            "macs": 41e6,
            "ms": {"1": 2.0, "64": 50.0},
            "nbytes": 12e6,
            "peak_bytes": {"64": 9e6},
        },
        "scop-45": {"numbers": 1e6, "macs": 13e6, "ms": {"1": 1.0, "64": 24.96}},
    }
    row = {**RUN, "recipe": "scop-45", "algorithm": "scop", "sizes": ends}
    unpruned = {**RUN, "algorithm": "simqat", "sizes": ends}
    assert networks.pruned([row, unpruned]).splitlines()[2:] == [
        "| net | set | scop-45 | 3.00 -> 1.00 | 41.0 -> 13.0 | 2.0 -> 1.0 | 50.0 -> 25.0 | 12.00 -> - | 9.0 -> - |"
    ]


def test_photographs_are_the_last_row_of_each_setting():
    row = {"kind": "photographs", "model": "net", "setting": "w8", "sqnr_db": 23.46, "torch_sqnr_db": 23.1, "views": 20}
    row |= {"top1_kept": 19, "top5_kept": [5, 4], "nbytes": {"converted": 5.1e6}, "ms": {"float": 10, "converted": 5}}
    lines = networks.photographs([{**row, "time": "2"}, {**row, "time": "1", "top1_kept": 0}]).splitlines()
    assert lines[2:] == ["| net | w8 | 23.5 (torch: 23.1) | 19 of 20 | 5 of 5 and 4 of 5 | 5.1 | 0.50x |"]


def test_convolutions_of_a_network_add_up_and_the_slowest_of_ours_is_named():
    row = {"kind": "convolution", "device_name": "CPU", "network": "net", "batch": 1, "time": "1"}
    rows = [
        {**row, "layer": {"c": 3, "o": 4}, "ms": {"float32": 1.0, "bfloat16": 1.0, "w4": 1.0, "w8a8": 3.0}},
        {**row, "layer": {"c": 4, "o": 4}, "ms": {"float32": 3.0, "bfloat16": 1.0, "w4": 5.0, "w8a8": 1.0}},
    ]
    lines = times.convolutions(rows).splitlines()
    assert lines[2:] == ["| CPU | net | 1 | 2 | 4.00 | 0.50x | - | 1.50x | - | 1.00x | 1.67x c=4 o=4 | 3.00x c=3 o=4 |"]


def test_another_library_stands_beside_the_width_it_has():
    base = {"kind": "language", "model": "lm", "embeddings": None, "time": "1"}
    rows = [
        {**base, "provider": "float", "weights": "bfloat16", "perplexity": 7.28221, "nbytes_tensors": 269e6},
        {**base, "provider": "golden-stick", "weights": "int4", "perplexity": 12.0, "tokens_per_s": 5.5},
        {**base, "provider": "golden-stick", "weights": "int1", "perplexity": 123456.0, "embeddings": "int8"},
        {**base, "provider": "torchao", "weights": "int4", "perplexity": 13.0},
    ]
    assert language.language(rows).splitlines()[2:] == [
        "| bf16 | bf16 | 7.282 | 269 MB | - |  |",
        "| int4 | bf16 | 12 | - | 5.5 | torchao 13 |",
        "| int1 | int8 | 123,456 | - | - |  |",
    ]


def test_a_served_width_has_its_clients():
    row = {"kind": "serving", "model": "lm", "provider": "golden-stick", "weights": "int4@group:64", "embeddings": None}
    figures = {"clients": 8, "seconds": 60.4, "requests": 200, "tokens_per_s": 105.9, "single_tokens_per_s": 20.1}
    row |= {**figures, "nbytes_tensors": 113e6, "request_ms_p50": 2400, "request_ms_p95": 2600}
    floats = {**row, "provider": "float", "weights": "bfloat16", "nbytes_tensors": 269e6}
    assert language.serving([row, floats]).splitlines()[2:] == [
        "| bf16 | bf16 | 269.0 | 20.1 | 8 for 60 s | 200, none failed | 105.9 | 2400 | 2600 |",
        "| int4@group:64 | bf16 | 113.0 | 20.1 | 8 for 60 s | 200, none failed | 105.9 | 2400 | 2600 |",
    ]


def test_products_are_compared_with_the_float_ones_beside_them():
    assert times.products(PRODUCTS).splitlines() == [
        "| device | layer | bits | 1 rows | 16 rows |",
        "| --- | --- | --- | --- | --- |",
        "| A GPU, bf16 | 256x128 | 2 | 4.00x |  |",
        "| A GPU, bf16 | 256x128 | 4 | 2.00x | 0.50x |",
    ]
    assert plot.speedups(PRODUCTS) == {("256x128", 2): {1: 4.0}, ("256x128", 4): {1: 2.0, 16: 0.5}}


def test_calls_are_compared_with_what_others_took():
    rows = [{**row, "direction": "fwd"} for row in PRODUCTS]
    rows += [{**product("torch", 4, 1, 4.0), "direction": "fwd"}, {**product("hqq", 4, 1, 5.0), "direction": "f+b"}]
    assert times.ops(rows).splitlines()[3:5] == [
        "| A GPU | qmatmul | x=1x128 n=256 bits=2 | bf16 | fwd | 0.25 | - | - | float_linear 4.00x |",
        "| A GPU | qmatmul | x=1x128 n=256 bits=4 | bf16 | fwd | 0.5 | 8.00x | - | float_linear 2.00x |",
    ]


def test_what_is_usual_or_off_is_not_said_of_a_shape():
    shape = {"x": (1, 64, 7), "n": 8, "axis": 0, "group": 0, "qmin": 0, "zero": "middle", "bias": False, "stride": 2}
    assert cells.shape_text(shape | {"groups": 1, "out": True}) == "x=1x64x7 n=8 axis=0 qmin=0 stride=2 out=True"


def test_networks_are_compared_with_the_float_one_and_a_phase_that_is_missing_is_a_dash():
    about = {"kind": "model", "device_name": "A CPU", "network": "net", "input": [3, 8, 8], "time": "1", "commit": "a"}
    rows = [
        {**about, "algorithm": "float", "phase": "train", "batch": 8, "ms_p50": 10.0, "saved_bytes": 2e6},
        {**about, "algorithm": "float", "phase": "latency", "batch": 1, "ms_p50": 2.0, "nbytes": 4e6},
        {**about, "algorithm": "w4", "phase": "train", "batch": 8, "ms_p50": 15.0, "peak_bytes": 3e6},
        {**about, "algorithm": "w4", "phase": "all", "error": "ValueError: no"},
        {**about, "algorithm": "w2", "phase": "train", "batch": 8, "ms_p50": 20.0, "commit": "b"},  # without float
    ]
    assert times.models(rows).splitlines()[2:] == [
        "| A CPU | net 3x8x8 | 8 | float | 10.0 | 2.0 | 2.0 | - | 4.0 |",
        "| A CPU | net 3x8x8 | 8 | w4 | 15.0 (1.50x) | 3.0 | - | - | - |",
        "| A CPU | net 3x8x8 | 8 | w2 | 20.0 | - | - | - | - |",
    ]


def test_decoding_is_the_last_rate_of_each_model():
    row = {"kind": "decode", "device_name": "A CPU", "network": "lm", "dtype": "bfloat16", "per_s": 5.0, "nbytes": 1e6}
    rows = [{**row, "time": "2"}, {**row, "per_s": 1.0, "time": "1"}]
    assert language.decode(rows).splitlines()[2:] == ["| A CPU | lm | bf16 | - | - | - | 5.0 | 1.0 |"]


def test_decoding_with_a_graph_and_without_are_two_lines():
    row = {"kind": "decode", "device_name": "A GPU", "network": "lm", "dtype": "bfloat16", "per_s": 5.0, "nbytes": 1e6}
    rows = [
        {**row, "weights": "int4@group:64", "graph": graph, "first_ms": 2.5, "time": "1"} for graph in (True, False)
    ]
    rows += [{**row, "weights": "int2@group:64", "error": "RuntimeError: no", "time": "1"}]
    del rows[-1]["per_s"]
    assert language.decode(rows).splitlines()[2:] == [
        "| A GPU | lm | bf16 | int4@group:64 | - | 2.5 | 5.0 | 1.0 |",
        "| A GPU | lm | bf16 | int4@group:64 | graph | 2.5 | 5.0 | 1.0 |",
    ]


def test_a_cpu_is_named_with_its_instructions_where_a_row_has_them():
    row = {"kind": "decode", "device_name": "A CPU", "network": "lm", "dtype": "bfloat16", "per_s": 5.0, "nbytes": 1e6}
    rows = [{**row, "time": "1"}, {**row, "time": "2", "instructions": "AVX2"}]
    lines = language.decode(rows).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| A CPU, AVX2", "| A CPU"]
    assert record.environment("cpu")["instructions"] == instructions.described()


@pytest.fixture
def folder(tmp_path):
    """A file with one table, and rows of products in the place of results."""
    (tmp_path / "rows" / "gpu").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in PRODUCTS)
    (tmp_path / "rows" / "gpu" / "1.jsonl").write_text(rows)
    (tmp_path / "page.md").write_text("before\n<!-- table: products -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def test_tables_are_filled_in_place_and_a_stale_one_fails_the_check(folder, capsys):
    page, rows = folder / "page.md", ["--rows", str(folder / "rows")]
    assert main(["--check", "--file", str(page), *rows]) == 1
    assert "run `python -m bench.tables`" in capsys.readouterr().out and "old" in page.read_text()
    assert main(["--file", str(page), *rows]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table: products -->\n| device |") and text.endswith("|\n<!-- end -->\nafter\n")
    assert main(["--check", "--file", str(page), *rows]) == 0


@pytest.mark.parametrize(
    "name, message", [("nothing", "must be one of accuracy, pruned, language"), ("language", "needs rows in bench")]
)
def test_a_table_that_cannot_be_made_is_named(folder, capsys, name, message):
    page = folder / "page.md"
    page.write_text(f"<!-- table: {name} -->\n<!-- end -->\n")
    assert main(["--file", str(page), "--rows", str(folder / "rows")]) == 2
    assert message in capsys.readouterr().err


def test_points_of_the_roofline_are_of_our_calls():
    assert plot.roofline_points(PRODUCTS)["qmatmul"][0] == (0.5e9 * 0.5 / 1000, 0.5)
    assert len(plot.roofline_points(PRODUCTS)["qmatmul"]) == 4


def test_pictures_are_drawn_from_rows(folder):
    pytest.importorskip(
        "matplotlib", reason="matplotlib (extra report) is not installed: there is nothing to draw with"
    )
    assert plot.main([str(folder / "rows" / "gpu" / "1.jsonl")]) == 0
    for name in ("roofline", "speedup"):
        assert (folder / "rows" / "gpu" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_without_times_of_ours_draw_nothing(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"kind": "zoo"}) + "\n")
    assert plot.main([str(path)]) == 2
    assert "needs rows of bench.run with times of ours" in capsys.readouterr().err
    assert record.read_rows(path) == [{"kind": "zoo"}]


def test_a_page_that_is_not_there_is_one_line(capsys, tmp_path):
    assert main(["--file", str(tmp_path / "nowhere.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ways_to_search_are_means_over_seeds():
    row = {"kind": "search", "task": "bits", "data": "set", "float_epochs": 1, "tune_images": 9, "epochs": 2}
    row |= {
        "model": "resnet20",
        "evaluations": 60,
        "way": "ilp",
        "nbytes": 1000,
        "macs": 2e6,
        "ms": 0.5,
        "untuned": 40.0,
    }
    rows = [{**row, "seed": n, "accuracy": 80.0 + n, "search_cpu_seconds": 10 * n, "time": str(n)} for n in (1, 0, 2)]
    rows.append({**rows[0], "accuracy": 0.0, "time": "0"})  # an older row of the same run
    line = networks.search(rows).splitlines()[2]
    assert line == "| resnet20 | 3 bits | ilp | 3 | 1,000 | 2.0 | 0.50 | 40.00 | 81.00 | 80.00, 81.00, 82.00 | 10 |"
