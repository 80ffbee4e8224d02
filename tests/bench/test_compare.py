"""Comparing two commits: a regression is one in every round, and what cannot be compared is said."""

import json
import subprocess

import pytest

from bench import compare

KEY = ("fake_quant", "N=7", "float32", "fwd")


def write(path, ms, **changes):
    row = {"kind": "op", "op": KEY[0], "shape": {"N": 7}, "dtype": KEY[2], "direction": KEY[3], "provider": "ours"}
    path.write_text(json.dumps({**row, "ms_p20": ms, **changes}) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "rounds, verdict",
    [
        ([(1.0, 1.2), (1.0, 1.3)], "SLOWER"),
        ([(1.0, 1.2), (1.0, 0.9)], ""),
        ([(1.0, 1.04), (1.0, 1.3)], ""),
        ([(1.0, 0.5), (1.2, 0.7)], "faster"),
    ],
)
def test_only_what_every_round_shows_is_a_change(rounds, verdict):
    (change,) = compare.changes([({KEY: base}, {KEY: head}) for base, head in rounds])
    assert change.verdict(0.05) == verdict


def test_rows_that_one_side_lacks_are_left_out():
    other = ("quantize", *KEY[1:])
    assert [c.key for c in compare.changes([({KEY: 1.0, other: 1.0}, {KEY: 1.0})])] == [KEY]


@pytest.mark.parametrize("head, code, word", [(1.2, 1, "SLOWER"), (1.01, 0, "0 slower")])
def test_two_files_give_a_table_and_an_exit_code(head, code, word, tmp_path, capsys):
    assert compare.main([write(tmp_path / "a.jsonl", 1.0), write(tmp_path / "b.jsonl", head)]) == code
    assert word in capsys.readouterr().out


def test_rows_of_other_providers_and_kinds_do_not_count(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", 1.0, provider="torch")
    assert compare.main([path, path]) == 2
    assert "must hold rows of bench.run with times, got none" in capsys.readouterr().err


def test_what_is_no_commit_and_no_file_is_named(capsys, tmp_path):
    assert compare.main(["no-such-commit"]) == 2
    assert "'no-such-commit' must be a commit or a results file" in capsys.readouterr().err
    assert compare.main([write(tmp_path / "a.jsonl", 1.0), "HEAD"]) == 2
    assert "both be files or both be commits" in capsys.readouterr().err


def test_each_side_runs_its_own_sources_in_turns_and_worktrees_go_away(monkeypatch):
    seen = []

    def measured(tree, out, arguments):
        seen.append((tree, (tree / "bench" / "run.py").is_file(), list(arguments)))
        return {KEY: 1.0}

    monkeypatch.setattr(compare, "measure", measured)
    assert compare.main(["HEAD", "--rounds", "2", "--op", "fake_quant"]) == 0
    base, head = seen[0][0], seen[1][0]
    assert [tree for tree, _, _ in seen] == [base, head, base, head] and head == compare.ROOT
    assert all(found and arguments == ["--op", "fake_quant"] for _, found, arguments in seen)
    listed = subprocess.run(["git", "worktree", "list"], cwd=compare.ROOT, capture_output=True, text=True, check=True)
    assert not base.exists() and str(base) not in listed.stdout
