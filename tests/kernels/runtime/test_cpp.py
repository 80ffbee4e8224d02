"""C++ and compiled functions where nothing can be compiled, kept or found, and on CPUs that share what is kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gs_kernels.qconv2d.cpu import direct_int8
from gs_kernels.runtime import cpp, inductor, instructions
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.slb import cpu as slb

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiled for the CPU")
CODE = 'extern "C" void twice(float* x, int threads) { *x = 2 * *x; }\n'
LAYER = """
import torch
from gs_algos import quantize_weights
net = torch.nn.Sequential(torch.nn.Linear(1024, 512)).eval()
want = net(torch.ones(2, 1024))
got = quantize_weights(net, "int8@group:64")(torch.ones(2, 1024))
assert (got - want).norm() < 0.02 * want.norm(), (got, want)
"""


class Pair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int64), ("b", ctypes.c_int64)]


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_logged", set())


def doubled(functions: Any) -> float:
    x = ctypes.c_float(21)
    functions.twice(ctypes.byref(x), 1)
    return x.value


def load(source: Path, self_test: Callable[[Any], bool] = lambda _: True, structs: Sequence[Any] = ()) -> Any:
    return cpp.load_cpp(source, {"twice": (ctypes.c_void_p, ctypes.c_int)}, self_test, structs)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "code.cpp"
    path.write_text(CODE)
    return path


def run(code: str, **environment: str | None) -> str:
    """What a process says on stderr; it must end well."""
    env = {k: v for k, v in {**os.environ, "OMP_NUM_THREADS": "1", **environment}.items() if v is not None}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


needs_compiler = pytest.mark.skipif(cpp._which() is None, reason="needs a C++ compiler")


@needs_compiler
def test_code_is_compiled_once_and_said_once(source: Path, tmp_path: Path, monkeypatch, caplog):
    place = tmp_path / "with a space, and ü"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    assert doubled(load(source)) == 42
    assert [str(place) in r.message for r in caplog.records if r.levelname == "WARNING"] == [True]
    monkeypatch.setattr(cpp, "_compile", None)
    assert doubled(load(source)) == 42


@needs_compiler
@pytest.mark.parametrize("broken", ["a file", "damaged code"])
def test_a_folder_that_cannot_be_used_costs_a_compilation(
    broken: str, source: Path, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    if broken == "a file":
        (tmp_path / "kept").write_text("")
    else:
        library = Path(load(source)._name)
        library.unlink()  # its memory stays mapped
        library.write_bytes(b"no code")
    assert doubled(load(source)) == 42
    assert ("cannot be kept" in caplog.text) == (broken == "a file")


@needs_compiler
def test_without_a_home_code_is_kept_among_temporary_files(source: Path, tmp_path: Path, monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp.Path, "home", nobody)
    monkeypatch.setattr(cpp.tempfile, "gettempdir", lambda: str(tmp_path))
    assert doubled(load(source)) == 42
    assert list(tmp_path.glob("golden_stick_*/*.so"))


@pytest.mark.parametrize("what", ["no compiler", "a compiler that fails", "wrong code"])
def test_what_cannot_run_is_said_and_replaced(what: str, source: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    if what == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler --fast")
    elif what == "a compiler that fails":
        monkeypatch.setenv("CXX", "false")
    else:
        source.write_text("not C++")
    for _ in range(2):
        assert load(source) is None
    said = [r.message for r in caplog.records if "several times slower" in r.message]
    assert len(said) == 1 and "install a C++ compiler" in said[0]
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part"))


@needs_compiler
@pytest.mark.parametrize("exported", ["the size", "a larger size", "nothing"])
def test_a_struct_whose_size_python_has_wrong_is_logged_and_the_code_replaced(
    exported: str, source: Path, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    size = {"the size": 16, "a larger size": 24}.get(exported)
    source.write_text(CODE + (f'extern "C" const long long sizeof_Pair = {size};\n' if size else ""))

    def self_test(functions: Any) -> bool:
        assert exported == "the size", "called with a struct that the code reads otherwise"
        return doubled(functions) == 42

    assert (load(source, self_test, [Pair]) is None) == (exported != "the size")
    logged = [r.message for r in caplog.records if r.levelname == "WARNING" and "Pair" in r.message]
    assert len(logged) == (exported != "the size")
    assert all("has 16 bytes in Python" in text and str(size or "none") in text for text in logged)


@needs_compiler
@pytest.mark.parametrize("kernels", [direct_int8.kernels, slb.kernels])
def test_every_struct_of_the_code_of_this_package_has_the_size_that_python_gives_it(kernels: Any, caplog):
    assert kernels.__wrapped__() is not None
    assert "bytes in Python" not in caplog.text


def test_a_layer_runs_without_a_compiler(tmp_path: Path):
    said = run(LAYER, PATH=str(tmp_path), CXX=None, HOME=None, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "new"))
    assert said.count("compiling failed") == 1


def test_fused_functions_run_where_nothing_can_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    code = """
import torch
from gs_kernels import fake_quant
x, scale, zero = torch.linspace(-9, 9, 1 << 17), torch.ones(1), torch.zeros(1)
for _ in range(2):
    assert fake_quant(x, scale, zero, qmin=-8, qmax=7).equal(x.round().clamp(-8, 7))
"""
    assert run(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file")).count("compiling failed") == 1


@pytest.mark.parametrize("limit", ["ATen", "oneDNN", "neither"])
def test_a_newer_cpu_plays_an_older_one(limit: str, monkeypatch):
    names = ("avx2", "fma3", "f16c", *(f"avx512_{name}" for name in ("f", "bw", "vl", "dq", "vnni", "bf16")))
    able = dict.fromkeys(names, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    aten = "AVX2" if limit == "ATen" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2" if limit == "oneDNN" else "DEFAULT")
    functions = instructions.has, instructions._level
    for function in functions:
        function.cache_clear()
    try:
        found = instructions.vectors(), instructions.multiplies_int8(), instructions.described()
    finally:
        for function in functions:
            function.cache_clear()
    assert found == (("avx512", True, "AVX-512 VNNI BF16") if limit == "neither" else ("avx2", False, "AVX2"))


def test_fused_functions_are_compiled_for_the_vectors_that_the_cpp_is():
    """torch.compile's own key does not tell how wide the vectors are: each would run the other's code, wrongly."""
    bits = inductor.vector_bits()
    assert bits == {"avx512": 512, "avx2": 256}[instructions.vectors()] if instructions.vectors() else bits >= 1
