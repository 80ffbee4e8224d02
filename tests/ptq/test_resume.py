"""Calibrations that are killed, or stopped by a full disk, and go on with their journal."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from gs_algos.core.files import scratch_folder
from gs_algos.ptq.ptq import PTQ
from tests.helpers import small_disk
from tests.ptq.test_ptq import batches, calibrated, net


def gone_on(journal) -> dict[str, torch.Tensor]:
    algo = PTQ(weight="int4@group:8")
    model = algo.apply(net(), batches()[0])
    algo.calibrate(model, batches(), journal=journal)
    return model.state_dict()


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_killed_at_20_places_a_calibration_ends_with_the_same_bits_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.ptq.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert sum(case["kills"] for case in found.values()) == 20
    for name, case in found.items():
        assert case["same"], name
        assert all(file.startswith("block-") or file == "journal.json" for file in case["files"]), name


def test_what_a_killed_one_left_before_its_first_block_is_no_obstacle(tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / ".journal.json.0123456789abcdef").write_text("{")  # half a file
    (journal / ".activations.0123456789abcdef").mkdir()
    assert same(gone_on(journal), calibrated(net(), batches())[1].state_dict())
    assert sorted(os.listdir(journal))[0] == "block-00000.safetensors"


def test_activations_of_one_that_still_runs_are_left_alone(tmp_path):
    with scratch_folder(tmp_path / "activations") as folder:
        (tmp_path / "journal.json").write_text("{}")
        with pytest.raises(ValueError, match="must be a journal of version"):
            gone_on(tmp_path)
        assert folder.is_dir()


def test_a_disk_that_fills_up_loses_no_block_that_was_written(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:  # the journal and its folder, the first block and the folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; what was there is as before: .*block-00001"):
        gone_on(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["block-00000.safetensors", "journal.json"]
    assert same(gone_on(tmp_path), calibrated(net(), batches())[1].state_dict())


def test_no_space_for_activations_names_their_folder_and_leaves_nothing(tmp_path):
    algo = PTQ(weight="int4@group:8", budget=0)
    model = algo.apply(net(), batches()[0])
    with small_disk(2000), pytest.raises(OSError, match=r"File too large; nothing was written: .*activations.*bin"):
        algo.calibrate(model, batches(), journal=tmp_path)
    assert os.listdir(tmp_path) == ["journal.json"]
    algo.calibrate(model, batches(), journal=tmp_path)  # no weight was rounded yet
    assert same(model.state_dict(), calibrated(net(), batches())[1].state_dict())
