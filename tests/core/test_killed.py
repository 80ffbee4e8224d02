"""Killed (SIGKILL) before any of the file operations of a save, a process leaves what was there, or all that is new."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gs_algos
from gs_algos import SimQAT
from gs_algos.llm.load import load_language_model
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.convolutional import SmallConvNet, images
from tests.nets.language_models import save_folder, tiny_llama

# forks once for each file operation, and dies there: the folder `copy-<n>` is what the n-th death left
DIE_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path

KINDS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "tempfile.mkstemp"}

def everywhere(base, prepare, act):
    for point in range(1000):
        place = base / f"copy-{point}"
        prepare(place)
        child = os.fork()
        if child == 0:
            seen = 0
            def hook(event, arguments):
                nonlocal seen
                if event in KINDS and any(str(place) in str(argument) for argument in arguments):
                    if seen == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1
            sys.addaudithook(hook)
            act(place)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            print(point if os.WEXITSTATUS(status) == 0 else -1)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
"""

SAVE = """
import gs_algos
from tests.nets.convolutional import SmallConvNet

base = Path(sys.argv[1])
net = gs_algos.load(base / "old", SmallConvNet)
net.fc.weight.data.add_(1)
everywhere(base, lambda place: shutil.copytree(base / "old", place), lambda place: gs_algos.save(net, place))
"""

QUANTIZE = """
import torch, transformers
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint

torch.set_num_threads(1)
base = Path(sys.argv[1])
options = {"progress": False, "shard_bytes": 20_000}
act = lambda place: quantize_checkpoint(base / "float", place / "packed", "int4@group:32", **options)
act(base / "first")
everywhere(base, lambda place: place.mkdir(), act)
"""


def deaths(script: str, base: Path) -> int:
    """How many times it was killed until it came through."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    code = [sys.executable, "-c", DIE_EVERYWHERE + script, str(base)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, env=environment, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks at every file operation")
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path):
    torch.manual_seed(0)
    gs_algos.save(SimQAT().apply(SmallConvNet(), images()), tmp_path / "old")
    old = gs_algos.load(tmp_path / "old", SmallConvNet).state_dict()
    count = deaths(SAVE, tmp_path)
    assert count >= 6
    news = []
    for point in range(count + 1):
        state = gs_algos.load(tmp_path / f"copy-{point}", SmallConvNet).state_dict()
        new = torch.equal(state["fc.weight"], old["fc.weight"] + 1)
        news.append(new)
        assert new or torch.equal(state["fc.weight"], old["fc.weight"])
        assert all(torch.equal(state[key], old[key]) for key in old if key != "fc.weight")
    assert news == sorted(news) and not news[0] and news[-1]
    index = tmp_path / "copy-0" / "golden_stick.json"
    before = json.loads(index.read_text())["tensors"]["file"]
    gs_algos.save(gs_algos.load(tmp_path / f"copy-{count}", SmallConvNet), tmp_path / "copy-0")
    assert json.loads(index.read_text())["tensors"]["file"] != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks at every file operation")
def test_a_killed_quantize_leaves_no_folder_or_a_whole_one(tmp_path: Path):
    save_folder(tmp_path / "float", tiny_llama())
    count = deaths(QUANTIZE, tmp_path)
    assert count >= 10
    ids = torch.tensor([[1, 3, 4, 5]])
    with torch.no_grad():
        want = load_language_model(tmp_path / "first" / "packed")[0](ids).logits
        whole = []
        for point in range(count + 1):
            target = tmp_path / f"copy-{point}" / "packed"
            if target.exists():
                whole.append(point)
                assert torch.equal(load_language_model(target)[0](ids).logits, want)
    assert whole == [count]
    quantize_checkpoint(tmp_path / "float", tmp_path / f"copy-{count - 1}" / "packed", "int4@group:32", progress=False)
    assert [path.name for path in (tmp_path / f"copy-{count - 1}").iterdir()] == ["packed"]
    shutil.rmtree(tmp_path)
