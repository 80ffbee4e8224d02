"""Kernels that are compiled without a GPU are found by another checkout in another folder, by Triton's own keys."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from gs_kernels.runtime.dispatch import INTERPRET

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from bench.gpu import archive, conformance, precompile
from bench.gpu.items import Context
from bench.gpu.plan import Step, steps
from bench.gpu.precompile import ARCHIVE, is_cached, kernels_of
from gs_kernels.aot import collect_launches
from gs_kernels.runtime import device
from gs_kernels.runtime.device import Capabilities
from gs_kernels.runtime.opspec import specs
from tests.kernels import test_conformance

ROOT = Path(__file__).parents[2]
COUNT = """
from pathlib import Path
from bench.gpu import contact, precompile
from bench.gpu.items import Context
import bench
items = [item for item in contact.ITEMS if item.id == "contact/observe"]
context = Context("meta", 0.0, Path())
kernels, _ = precompile.kernels_of([(item.id, lambda item=item: item.launch(context)) for item in items], "sm_90")
print(Path(bench.__file__).parents[1], len(kernels), sum(map(precompile.is_cached, kernels)))
"""


def _few():
    """A step of the plan with few small kernels."""
    contact = next(step for step in steps() if step.name == "contact")
    return [Step("contact", 1.0, tuple(item for item in contact.items if item.id == "contact/observe"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What --precompile prints and leaves behind, for few kernels, one process."""
    folder = tmp_path_factory.mktemp("made")
    code = (
        "import sys; sys.path.insert(0, 'tests/bench')\n"
        "from pathlib import Path\n"
        "from test_precompile import _few\n"
        "from bench.gpu.precompile import precompile\n"
        "if __name__ == '__main__':\n"
        f"    sys.exit(precompile(Path({str(folder)!r}), 'sm_90', 1, None, _few()))\n"
    )
    script = folder / "make.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run.stdout


def test_a_second_checkout_hits_every_kernel_of_the_archive(made, tmp_path):
    folder, printed = made
    assert "0 kernels were in the cache" in printed and "0 failed" in printed
    second, cache = tmp_path / "elsewhere", tmp_path / "cache"
    for name in ("bench", "gs_algos", "gs_kernels"):
        shutil.copytree(ROOT / name, second / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    about = archive.unpack(folder / ARCHIVE, cache)
    env = {**os.environ, "PYTHONPATH": str(second), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", COUNT], cwd=second, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    place, kernels, hits = run.stdout.split()
    assert place == str(second) and int(kernels) == int(hits) == about["kernels"] > 1
    # made in a folder that need not be there any more, without what nobody reads
    lists = [json.loads(path.read_text())["child_paths"] for path in cache.glob("*/__grp__*.json")]
    assert lists and all(Path(path).is_relative_to(cache) for one in lists for path in one.values())
    assert not list(cache.glob("*/*.source"))


def test_launchers_are_built_without_a_gpu_where_triton_builds_them(made):
    import triton.backends.nvidia.driver as nvidia

    _, printed = made
    builds = "make_launcher" in vars(nvidia)
    launchers = int(printed.split(" launchers")[0].rsplit(" ", 1)[1])
    assert (launchers > 0) == builds


@pytest.mark.parametrize("op", ["slb_weight", "qmatmul"])
def test_the_conformance_tests_launch_what_is_collected_for_them(monkeypatch, op):
    """On CPU tensors that count as a GPU's: a key holds what Triton sees of addresses, sizes and strides."""
    spec = next(spec for spec in specs() if spec.name == op)
    monkeypatch.setattr(conformance, "specs", lambda: (spec,))
    collected, _ = kernels_of([("conformance", call) for call in conformance.launches()], "sm_90")
    monkeypatch.setattr(device, "on_gpu", torch.Tensor.is_cpu.__get__)
    monkeypatch.setattr(device, "current_index", lambda: -1)
    monkeypatch.setattr(device, "capturing", lambda: False)
    monkeypatch.setattr(device, "capabilities", lambda index=0: Capabilities("NVIDIA H200", 90, 132))
    monkeypatch.setattr(torch.testing, "assert_close", lambda *args, **kwargs: None)  # nothing was computed
    monkeypatch.setattr(test_conformance, "relative_rms", lambda *args: 0.0)
    monkeypatch.setattr(test_conformance, "same_bits", lambda *args: True)
    with collect_launches("sm_90") as launched:
        for shape in spec.test_shapes:
            for dtype in spec.tol:
                layouts = ("dense", "sliced", "reversed", "spread") if dtype == torch.float32 else ("dense",)
                for layout in layouts[: 4 if len(shape["x"]) >= 2 else 1]:
                    test_conformance._agrees_with_reference(spec, shape, dtype, layout, torch.device("cpu"))
            test_conformance.test_two_runs_give_the_same_bits(spec, shape, torch.float32, torch.device("cpu"))
    assert launched and {(k.name, k.key) for k in launched} <= {(k.name, k.key) for k in collected}


def test_a_cache_without_the_kernels_hits_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    item = _few()[0].items[0]
    kernels, failed = kernels_of([(item.id, lambda: item.launch(Context("meta", 0.0, Path())))], "sm_90")
    assert not failed and len(kernels) > 1 and not any(map(is_cached, kernels))


def test_a_call_that_cannot_be_made_is_named_and_costs_no_other():
    def broken():
        raise KeyError("x")

    item = _few()[0].items[0]
    calls = [("broken", broken), (item.id, lambda: item.launch(Context("meta", 0.0, Path())))]
    kernels, failed = kernels_of(calls, "sm_90")
    assert kernels and failed == {"broken": "KeyError: 'x'"}


def test_every_item_of_the_plan_says_what_it_launches():
    """Products, tiles and checks: the first and the last of a step."""
    known = [step for step in steps() if step.name in ("contact", "w4", "w4a8", "elements", "tuner")]
    plan = [Step(step.name, 1.0, (step.items[0], step.items[-1])) for step in known]
    names = {kernel.name for kernel in kernels_of(precompile.calls_of(plan, None), "sm_90")[0]}
    assert {"_qmatmul_kernel", "_add_parts_kernel", "_slb_weight_bwd_kernel", "_qmatmul_int8_kernel"} <= names


def test_keys_depend_on_no_order_in_which_kernels_are_met():
    """Two processes, the one in which _reduce_kernel comes first, which shares the epilogue of _qmatmul_kernel."""
    code = (
        "from gs_kernels.qmatmul.kernel import matmul\n"
        "from gs_kernels.triton_epilogue import _reduce_kernel\n"
        "from bench.gpu.keys import settle_keys\n"
        "first = [kernel.cache_key for kernel in {names}]\n"
        "settle_keys()\n"
        "print(matmul._qmatmul_kernel.cache_key, first)"
    )
    keys = set()
    for names in ("[matmul._qmatmul_kernel]", "[_reduce_kernel, matmul._qmatmul_kernel]"):
        argv = [sys.executable, "-c", code.format(names=names)]
        run = subprocess.run(
            argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        keys.add(run.stdout.split()[0])
    assert len(keys) == 1


def _archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "members, message",
    [
        ({}, "must have format 1, got None"),
        ({"manifest.json": b'{"format": 2}'}, "must have format 1, got {'format': 2}"),
        ({"../key": b""}, "a member is ../key"),
        ({"key/../../x": b""}, "a member is key/../../x"),
        ({"/x": b""}, "a member is /x"),
    ],
)
def test_an_archive_of_something_else_is_refused_and_writes_nothing_outside(tmp_path, members, message):
    path = _archive(tmp_path / "a.tar.gz", members)
    with pytest.raises(ValueError, match=message):
        archive.unpack(path, tmp_path / "in" / "cache")
    assert not list(tmp_path.glob("**/x")) and not list(tmp_path.glob("**/key"))


def test_a_file_that_is_no_archive_or_half_of_one_is_refused(made, tmp_path):
    whole = (made[0] / ARCHIVE).read_bytes()
    for data in (b"no archive", whole[: len(whole) // 2]):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match="must be an archive of --precompile"):
            archive.unpack(tmp_path / "a", tmp_path / "cache")


def test_lists_of_files_are_written_for_the_folder_they_are_unpacked_to(tmp_path):
    group = json.dumps({"child_paths": {"k.cubin": "/made/here/key/k.cubin"}}).encode()
    members = {"manifest.json": b'{"format": 1}', "key/__grp__k.json": group, "key/k.cubin": b"code"}
    assert archive.unpack(_archive(tmp_path / "a", members), tmp_path / "cache") == {"format": 1}
    found = json.loads((tmp_path / "cache" / "key" / "__grp__k.json").read_text())
    assert found == {"child_paths": {"k.cubin": str(tmp_path / "cache" / "key" / "k.cubin")}}
