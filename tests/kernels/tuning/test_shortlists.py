"""Short lists of tiles: what is written where tiles are ranked is read where they are timed, and nothing else is."""

import dataclasses
import json

import pytest

from gs_kernels.tuning import tuner
from gs_kernels.tuning.shortlists import ShortList, read_lists, write_lists
from gs_kernels.tuning.tables import read_table

TILE = {"dense": False, "scale_parts": True, "block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "programs": 0}
PROBLEM = {"m": 16, "n": 4096, "k": 4096, "bits": 4}
LISTS = [ShortList("qmatmul", PROBLEM, (TILE, {**TILE, "block_n": 32}))]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "lists.json"
    write_lists(path, "A GPU", LISTS)
    assert read_lists(path) == LISTS and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format=2), "must have format 1, got 2; rank tiles again"),
        (lambda d: d.pop("lists"), r"must hold short lists, got KeyError\('lists'\)"),
        (lambda d: d["lists"][0].update(op="conv"), "list 0: op must be one of fake_quant, .* got 'conv'"),
        (lambda d: d["lists"][0]["problem"].pop("m"), "list 0: problem must have m, n, k, bits"),
        (lambda d: d["lists"][0]["tiles"][1].update(block_n=100), r"list 0: block_n must be one of \[32, 64, 128"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path, change, message):
    path = tmp_path / "lists.json"
    write_lists(path, "A GPU", LISTS)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_lists(path)


def test_a_problem_with_a_list_is_not_ranked_and_each_tile_is_told(tmp_path, monkeypatch):
    about = dataclasses.make_dataclass("C", ["name", "sm", "sm_count"])("GPU", 90, 132)
    monkeypatch.setattr(tuner, "capabilities", lambda index: about)
    monkeypatch.setattr(tuner.Static, "rank", lambda *args, **kwargs: pytest.fail("ranked"))
    seen = []

    def measured(space, problem, candidates, device, note):
        for tile in candidates:
            note(tile, float(tile["block_n"]))
        return [tuner.Entry(problem, candidates[-1], 32.0)]

    monkeypatch.setattr(tuner, "measure", measured)
    path = tmp_path / "gpu.json"
    tuner.tune([("qmatmul", PROBLEM)], path, lists=LISTS, note=lambda *told: seen.append(told))
    assert seen == [("qmatmul", PROBLEM, tile, float(tile["block_n"])) for tile in LISTS[0].tiles]
    assert read_table(path).ops["qmatmul"][0].tile["block_n"] == 32
