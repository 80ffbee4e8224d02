"""What was measured is kept: a search that was killed, or has another budget, goes on from it."""

from __future__ import annotations

import json

import pytest
import torch

from gs_algos.search.evaluate import Evaluations
from gs_algos.search.journal import Journal
from gs_algos.search.search import search_rules
from tests.search.nets import data, found, images, net

OPTIONS = {"budget": "20% bytes", "agent": "evolution", "evaluations": 40}


class Killed(BaseException):
    pass


def die_after(count, monkeypatch):
    measured = Evaluations._measured
    left = [count]

    def dying(self, setting, index):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return measured(self, setting, index)

    monkeypatch.setattr(Evaluations, "_measured", dying)


def test_a_killed_search_ends_with_the_policy_of_one_that_was_not(tmp_path, monkeypatch):
    whole = found(**OPTIONS)
    with monkeypatch.context() as patch:
        die_after(whole.evaluated // 2, patch)
        with pytest.raises(Killed):
            found(journal=tmp_path / "j", **OPTIONS)
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"policy": {"3:wei')  # the line that a killed process was writing
    resumed = found(journal=tmp_path / "j", **OPTIONS)
    assert (resumed.rules, resumed.score) == (whole.rules, whole.score)
    assert whole.evaluated >= 4 and resumed.evaluated == whole.evaluated - whole.evaluated // 2


def test_each_evaluation_is_a_line(tmp_path):
    policy = found(journal=tmp_path / "j", budget="16% bytes", evaluations=3)
    head, *lines = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert head["format"] == "golden-stick search"
    assert sum("policy" in line for line in lines) == policy.evaluated
    assert max(line["score"] for line in lines if "policy" in line) == policy.score


def test_another_budget_measures_no_score_again(tmp_path, monkeypatch):
    found(journal=tmp_path / "j", budget="16% bytes", evaluations=2)

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("gs_algos.search.evaluate.sensitivity", never)
    assert found(journal=tmp_path / "j", budget="14% bytes", evaluations=1).costs["bytes"] < 5000


def test_a_journal_of_another_network_or_other_data_is_refused(tmp_path):
    found(journal=tmp_path / "j", budget="16% bytes", evaluations=1)
    with pytest.raises(ValueError, match=r"must be of this network, these algorithms and this data, got .*j of others"):
        found(model=net(seed=5), journal=tmp_path / "j", budget="16% bytes")
    with pytest.raises(ValueError, match=r"got .* of others"):
        found(journal=tmp_path / "j", budget="16% bytes", evaluate=lambda network: 0.0)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "must be a journal of version 1"),
        (b'{"format": "golden-stick search", "version": 2, "digest": ""}\n', "must be a journal of version 1"),
        (b"hello\n", "line 1 of .* must be JSON"),
        (b"[1]\n", "line 1 of .* must be an object"),
        (b'{"format": "golden-stick search", "version": 1, "digest": "d"}\n{"policy": 3}\n', "line 2 .* must hold"),
        (b'{"format": "golden-stick search", "version": 1, "digest": "d"}\n{"scores": 3}\n', "line 2 .* must hold"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path, content, words):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Journal(tmp_path / "j", "d", "search")
    assert (tmp_path / "j").read_bytes() == content


def test_a_journal_must_be_a_file_in_a_folder_that_is_there(tmp_path):
    with pytest.raises(ValueError, match="journal must be a file, got the folder"):
        Journal(tmp_path, "d", "search")
    with pytest.raises(ValueError, match="journal must be in a folder that is there"):
        Journal(tmp_path / "no" / "j", "d", "search")


def test_it_searches_in_inference_mode_as_outside():
    outside, model, x, batches = found(budget="16% bytes", evaluations=3), net(), images(), data()
    with torch.inference_mode():
        inside = search_rules(model, x, outside._given, batches, budget="16% bytes", evaluations=3)
    assert inside.rules == outside.rules
