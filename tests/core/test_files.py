"""Writers and readers of one place at once, writers that were killed or ran out of space: one whole thing is there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gs_algos
from gs_algos import SimQAT
from gs_algos.cli.info_network import describe
from gs_algos.core import checkpoint, files
from gs_algos.core.files import abandoned, scratch_folder, whole_file, write_atomically
from gs_algos.llm.folder import ShardWriter, whole_folder
from tests.helpers import small_disk

INDEX = "golden_stick.json"
DIGITS = "0123456789abcdef"
locks = pytest.mark.skipif(files.fcntl is None, reason="without flock an hour decides what is left over")


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def net(value: float) -> nn.Module:
    """A prepared network with a bias that tells it from others."""
    made = SimQAT().apply(build(), torch.ones(2, 4))
    nn.init.constant_(made[0].bias, value)
    return made


def loaded(folder: Path) -> float:
    return gs_algos.load(folder, build)[0].bias[0].item()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As if another process were writing the file or folder."""
    handle = os.open(path, os.O_RDONLY)
    files.fcntl.flock(handle, files.fcntl.LOCK_EX)
    yield
    os.close(handle)


@contextmanager
def before_replacing(name: str, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this thread, `act` runs once just before a file of this name gets into place."""
    real, thread, left = os.replace, threading.current_thread(), [act]

    def replace(source: Any, target: Any) -> None:
        if left and threading.current_thread() is thread and Path(target).name == name:
            left.pop()()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    yield
    monkeypatch.undo()


@locks
def test_a_save_within_another_saves_last_step_leaves_the_checkpoint_of_the_one_that_ends_last(tmp_path, monkeypatch):
    gs_algos.save(net(0), tmp_path)
    with before_replacing(INDEX, lambda: gs_algos.save(net(1), tmp_path), monkeypatch):
        gs_algos.save(net(2), tmp_path)
    assert loaded(tmp_path) == 2 and len(names(tmp_path)) == 2


def test_saves_of_many_threads_leave_one_whole_checkpoint(tmp_path):
    nets = [net(value) for value in range(6)]
    threads = [threading.Thread(target=gs_algos.save, args=(each, tmp_path)) for each in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded(tmp_path) in range(6)
    gs_algos.save(net(7), tmp_path)
    assert loaded(tmp_path) == 7 and (len(names(tmp_path)) == 2 or files.fcntl is None)


@pytest.mark.parametrize("read", [loaded, describe], ids=["load", "info"])
def test_a_reader_whose_tensor_file_is_replaced_meanwhile_reads_the_new_one(tmp_path, read, monkeypatch):
    gs_algos.save(net(1), tmp_path)
    old = tensor_file(tmp_path)
    real, saves = checkpoint.read_index, iter([2, 3])

    def read_index(folder: Path) -> dict[str, Any]:
        index = real(folder)
        for value in saves:
            gs_algos.save(net(value), tmp_path)
            (tmp_path / index["tensors"]["file"]).unlink(missing_ok=True)
            break
        return index

    monkeypatch.setattr(checkpoint, "read_index", read_index)
    assert read(tmp_path) in (3, describe(tmp_path)) and tensor_file(tmp_path) != old


def test_a_checkpoint_whose_tensor_file_is_gone_for_good_is_not_read_for_ever(tmp_path):
    gs_algos.save(net(1), tmp_path)
    tensor_file(tmp_path).unlink()
    with pytest.raises(ValueError, match=r"must hold model-\w+.safetensors, which is missing"):
        gs_algos.load(tmp_path, build)


def test_the_names_of_older_checkpoints_load_and_give_way_to_a_new_one(tmp_path):
    gs_algos.save(net(1), tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    old = f"model-{index['tensors']['sha256'][:16]}.safetensors"  # as it was named once
    tensor_file(tmp_path).rename(tmp_path / old)
    (tmp_path / INDEX).write_text(json.dumps({**index, "tensors": {**index["tensors"], "file": old}}))
    assert loaded(tmp_path) == 1
    gs_algos.save(net(2), tmp_path)
    assert loaded(tmp_path) == 2 and (len(names(tmp_path)) == 2 or files.fcntl is None)


@locks
def test_a_save_clears_what_killed_saves_left_and_nothing_else(tmp_path):
    gs_algos.save(net(1), tmp_path)
    left = [f"model-{DIGITS}.safetensors", f".model-{DIGITS}.safetensors.{DIGITS}", f".{INDEX}.{DIGITS}"]
    foreign = ["model-00001-of-00002.safetensors", ".hidden", "notes.txt", f".notes.txt.{DIGITS}", f"{INDEX}.old"]
    for name in [*left, *foreign]:
        (tmp_path / name).write_bytes(b"half")
    gs_algos.save(net(2), tmp_path)
    assert names(tmp_path) == sorted([*foreign, INDEX, tensor_file(tmp_path).name])


@locks
@pytest.mark.parametrize("name", [f"model-{DIGITS}.safetensors", f".model-{DIGITS}.safetensors.{DIGITS}"])
def test_a_save_leaves_what_another_process_is_writing(tmp_path, name):
    (tmp_path / name).write_bytes(b"half")
    with locked(tmp_path / name):
        gs_algos.save(net(1), tmp_path)
        assert name in names(tmp_path)
    gs_algos.save(net(1), tmp_path)
    assert name not in names(tmp_path)


def test_without_locks_an_hour_decides_what_is_left_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    new, old = tmp_path / f"model-{DIGITS}.safetensors", tmp_path / f"model-{DIGITS[::-1]}.safetensors"
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    gs_algos.save(net(1), tmp_path)
    assert new.exists() and not old.exists() and loaded(tmp_path) == 1


def test_a_target_that_windows_keeps_for_a_reader_is_replaced_once_it_lets_go(tmp_path, monkeypatch):
    real, refusals = os.replace, iter([PermissionError(13, "used by another process")] * 3)

    def replace(source: Any, target: Any) -> None:
        for refusal in refusals:
            raise refusal
        real(source, target)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("nbytes, name", [(100, "model-"), (900, INDEX)], ids=["tensors", "JSON"])
def test_a_save_without_space_keeps_the_old_checkpoint_and_leaves_nothing(tmp_path, nbytes, name):
    gs_algos.save(net(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert tensor_file(tmp_path).stat().st_size < 900 < (tmp_path / INDEX).stat().st_size
    with small_disk(nbytes), pytest.raises(OSError, match=rf"File too large; what was there is as before: .*{name}"):
        gs_algos.save(net(2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and loaded(tmp_path) == 1


def test_an_interrupt_after_the_last_step_keeps_the_new_checkpoint(tmp_path, monkeypatch):
    gs_algos.save(net(1), tmp_path)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name == INDEX:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        gs_algos.save(net(2), tmp_path)
    monkeypatch.undo()
    assert loaded(tmp_path) == 2


@locks
def test_what_a_killed_writer_of_one_file_left_goes_with_the_next_write(tmp_path):
    for name in (f".a.{DIGITS}", f".b.{DIGITS}"):
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "a", b"whole")
    assert names(tmp_path) == [f".b.{DIGITS}", "a"]


def test_a_file_gets_the_permissions_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert os.name == "nt" or (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def fill(target: Path, who: str, act: Callable[[Path], None]) -> None:
    with whole_folder(target, who) as folder:
        act(folder)


@locks
def test_two_commands_that_write_one_folder_are_told_apart(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target, "first") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(ValueError, match=r"second: .*out must be for this call alone, got one that another call"):
            fill(target, "second", lambda _: None)
    assert (target / "a").read_text() == "first" and names(tmp_path) == ["out"]


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"

    def act(folder: Path) -> None:
        (folder / "a").write_text("mine")
        target.mkdir()
        (target / "b").write_text("theirs")

    with pytest.raises(ValueError, match=r"who: .*out must be new or an empty folder, got one that was filled meanwhi"):
        fill(target, "who", act)
    assert names(target) == ["b"] and names(tmp_path) == ["out"]


def test_a_file_or_a_full_folder_in_the_place_of_a_new_one_is_said_and_left(tmp_path):
    target = tmp_path / "out"
    target.write_text("theirs")
    with pytest.raises(
        ValueError, match=r"out must be new or an empty folder, got a file; choose another or delete it"
    ):
        fill(target, "who", lambda _: None)
    with pytest.raises(ValueError, match="must be new or an empty folder, got one with content"):
        fill(tmp_path, "who", lambda _: None)
    assert target.read_text() == "theirs" and names(tmp_path) == ["out"]


@locks
def test_a_folder_clears_what_killed_commands_left_beside_it(tmp_path):
    for name in (f".out.{DIGITS}", f".out.{DIGITS[::-1]}", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.safetensors").write_bytes(b"half")
    with whole_folder(tmp_path / "out", "who") as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_a_folder_without_space_says_where_and_leaves_nothing(tmp_path):
    def act(folder: Path) -> None:
        shards = ShardWriter(folder)
        shards.add("x", torch.zeros(1000))
        shards.close()

    with small_disk(1000), pytest.raises(OSError, match=r"who: the folder cannot be written.*none is left: .*out"):
        fill(tmp_path / "out", "who", act)
    assert names(tmp_path) == []


def test_a_file_brings_along_what_is_written_beside_it(tmp_path):
    with whole_file(tmp_path / "net.onnx") as draft:
        draft.write_text("net")
        (draft.parent / "net.onnx.data").write_text("data")
        assert names(draft.parent) == ["net.onnx", "net.onnx.data"] and not (tmp_path / "net.onnx").exists()
    assert names(tmp_path) == ["net.onnx", "net.onnx.data"]


def test_a_file_whose_writing_failed_is_not_there(tmp_path):
    def write() -> None:
        with whole_file(tmp_path / "net.pt2") as draft:
            draft.write_text("half")
            raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        write()
    assert names(tmp_path) == []


@locks
def test_a_draft_is_abandoned_once_its_writer_is_gone(tmp_path):
    with scratch_folder(tmp_path / "out") as folder:
        assert not abandoned(folder)
    folder.mkdir()
    assert abandoned(folder)


def tensor_file(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["tensors"]["file"]
