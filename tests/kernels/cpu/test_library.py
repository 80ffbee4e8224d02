"""The library of C++ kernels where it is missing, old or broken, and each set of instructions that this CPU has."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gs_kernels.adder.cpu import float as adder
from gs_kernels.adder.cpu import int8 as adder_int8
from gs_kernels.cpu import build, compile, library
from gs_kernels.decoder_step import cpu as decoder_step
from gs_kernels.fake_quant import cpu as fake_quant
from gs_kernels.gptq_block import cpu as gptq_block
from gs_kernels.kl_divergence import cpu as kl_divergence
from gs_kernels.pack import rows
from gs_kernels.program import cpu as program
from gs_kernels.qconv2d.cpu import int8_kernel
from gs_kernels.qmatmul.cpu import interleaved_product, quantize_rows
from gs_kernels.requantize import passes
from gs_kernels.runtime import instructions
from gs_kernels.runtime.dispatch import INTERPRET, UnsupportedError
from gs_kernels.search_clip_ratio import cpu as search_clip_ratio
from gs_kernels.slb import cpu as slb

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiled for the CPU")
TWICE = '#include "parallel.h"\nEXPORT void twice(float* x, int threads) { *x = 2 * *x; }\n'
LAYER = """
import torch
from pathlib import Path
from gs_kernels.cpu import library
library.path_of = lambda name: Path("/no/library")
from gs_algos import quantize_weights
net = torch.nn.Sequential(torch.nn.Linear(1024, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)).eval()
want = net(torch.ones(2, 1024))
got = quantize_weights(net, "int8@group:64")(torch.ones(2, 1024))
assert (got - want).norm() < 0.02 * want.norm(), (got, want)
"""


class Pair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int64), ("b", ctypes.c_int64)]


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_problems", {})


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that takes no time, in place of those of the package; its library is not loaded yet."""
    path = tmp_path / "code.cpp"
    path.write_text(TWICE)
    monkeypatch.setattr(compile, "sources", lambda: [path, compile.FOLDER / "library.cpp"])
    monkeypatch.setattr(compile, "source_hash", lambda: path.read_text()[-16:].encode().hex())
    monkeypatch.setattr(library, "source_hash", compile.source_hash)
    library.library.cache_clear()
    yield path
    library.library.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(map(compile.shutil.which, compile.COMPILERS)), reason="needs a C++ compiler"
)


def built(place: Path) -> Path:
    return compile.build("generic", place / "kernels.so")


def load(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    self_test: Callable[[Any], bool] = lambda _: True,
    structs: Sequence[Any] = (),
) -> Any:
    monkeypatch.setattr(library, "path_of", lambda name: path)
    library.library.cache_clear()
    return library.load_functions("doubling", {"twice": (ctypes.c_void_p, ctypes.c_int)}, self_test, structs)


def doubled(functions: Any) -> float:
    x = ctypes.c_float(21)
    functions.twice(ctypes.byref(x), 1)
    return x.value


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


@needs_compiler
def test_a_library_is_built_and_loaded_from_a_folder_of_any_name(sources: Path, tmp_path: Path, monkeypatch, caplog):
    path = built(tmp_path / "with a space, and ü")
    assert doubled(load(path, monkeypatch)) == 42 and not warnings(caplog)
    assert [p.name for p in path.parent.iterdir()] == ["kernels.so"]


@needs_compiler
def test_an_installation_takes_a_library_of_these_sources_and_flags_and_no_other(sources: Path, tmp_path: Path):
    plain = built(tmp_path / "plain")
    checked = compile.build("generic", tmp_path / "checked.so", ["-O2"])
    assert compile.is_current(plain, "generic") and not compile.is_current(checked, "generic")
    sources.write_text(TWICE + "// another\n")
    assert not compile.is_current(plain, "generic") and not compile.is_current(tmp_path / "nowhere.so", "generic")


@pytest.mark.parametrize("what", ["no compiler", "a compiler that fails", "wrong code", "a file for a folder"])
def test_a_build_that_fails_says_why_in_a_line_and_writes_nothing(
    what: str, sources: Path, tmp_path: Path, monkeypatch, capsys
):
    place, said = tmp_path / "out", "is in PATH"
    if what == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler --fast")
    elif what == "a compiler that fails":
        monkeypatch.setenv("CXX", "false")
        said = "false failed: no message"
    elif what == "wrong code":
        sources.write_text("not C++")
        said = "error"
    else:
        place.write_text("")
        said = "cannot be written"
    if what in ("wrong code", "a file for a folder") and not any(map(compile.shutil.which, compile.COMPILERS)):
        pytest.skip("needs a C++ compiler")
    assert build.main(["--only", "generic", "--out", str(place)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part"))


@needs_compiler
@pytest.mark.parametrize("what", ["missing", "damaged", "of other sources", "wrong results"])
def test_a_library_that_cannot_be_used_is_said_once_and_left(
    what: str, sources: Path, tmp_path: Path, monkeypatch, caplog
):
    path = built(tmp_path)
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.write_bytes(b"no code")
    elif what == "of other sources":
        sources.write_text(TWICE + "// changed\n")
    for _ in range(2):
        assert load(path, monkeypatch, lambda _: what != "wrong results") is None
    said = {
        "missing": "was not built; run `python -m gs_kernels.cpu.build`",
        "damaged": "cannot be loaded",
        "of other sources": "was built from other sources",
        "wrong results": "compute wrong results on this CPU",
    }[what]
    assert len(warnings(caplog)) == 1 and said in warnings(caplog)[0]
    assert len(library.problems()) == 1 and said in library.problems()[0]


@needs_compiler
@pytest.mark.parametrize("exported", ["the size", "a larger size", "nothing"])
def test_a_struct_whose_size_python_has_wrong_is_said_and_the_code_left(
    exported: str, sources: Path, tmp_path: Path, monkeypatch, caplog
):
    size = {"the size": 16, "a larger size": 24}.get(exported)
    sources.write_text(TWICE + (f"EXPORT const int64_t sizeof_Pair = {size};\n" if size else ""))

    def self_test(functions: Any) -> bool:
        assert exported == "the size", "called with a struct that the code reads otherwise"
        return doubled(functions) == 42

    right = exported == "the size"
    assert (load(built(tmp_path), monkeypatch, self_test, [Pair]) is not None) == right
    said = "its struct Pair has 24 bytes, and 16 in Python" if size else "undefined symbol: sizeof_Pair"
    assert len(warnings(caplog)) == (not right) and all(said in text for text in warnings(caplog))


SELF_TESTS: list[tuple[Any, Callable[[Any], bool]]] = [
    (int8_kernel, int8_kernel.self_test),
    (interleaved_product, interleaved_product.self_test),
    (quantize_rows, quantize_rows.self_test),
    (rows, rows.self_test),
    (decoder_step, decoder_step.self_test),
    (fake_quant, fake_quant.self_test),
    (passes, passes.self_test),
    (program, program.self_test),
    (slb, slb._self_test),
    (gptq_block, gptq_block._self_test),
    (search_clip_ratio, search_clip_ratio._self_test),
    (kl_divergence, kl_divergence._self_test),
    (adder, adder._self_test),
    (adder_int8, adder_int8._self_test),
]


@pytest.mark.parametrize("name", compile.instruction_sets())
def test_every_set_of_instructions_that_this_cpu_has_computes_what_it_should(name: str):
    """Those that it lacks are at least built."""
    assert library.path_of(name).is_file()
    if not all(map(instructions.has, instructions.REQUIRED[name])):
        pytest.skip(f"this CPU has no {name}")
    found = library.open_library(library.path_of(name))
    for module, self_test in SELF_TESTS:
        declared = module.kernels()
        assert declared is not None
        copy_declarations(declared, found, module.FUNCTIONS)
        assert self_test(found), module.__name__


def copy_declarations(declared: Any, found: Any, names: Iterable[str]) -> None:
    for name in names:
        getattr(found, name).argtypes = getattr(declared, name).argtypes
        getattr(found, name).restype = getattr(declared, name).restype


WITH_STRUCTS = [int8_kernel, interleaved_product, fake_quant, slb, gptq_block, passes, program, kl_divergence]


@pytest.mark.parametrize("module", WITH_STRUCTS)
def test_every_struct_of_the_code_of_this_package_has_the_size_that_python_gives_it(module: Any, caplog):
    assert module.kernels.__wrapped__() is not None and not warnings(caplog)


def test_threads_are_those_of_pytorch():
    started = []
    run = library._threads_of_pytorch()
    assert run is not None
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: started.append(run[1]()))
    run[0](body, None, 2, 0)
    assert sorted(started) == [0, 1]


FORK = """
import os, signal, torch
from gs_kernels import pack_weight, qconv2d_int8
torch.set_num_threads(2)
x = torch.randint(-128, 128, (4, 64, 28, 28), dtype=torch.int8).contiguous(memory_format=torch.channels_last)
w = pack_weight(torch.randint(256, (64, 576), dtype=torch.uint8), torch.ones(64, 1), 128.0, bits=8, group_size=576)
# nothing large is left to PyTorch, which waits for its threads for ever
convolve = lambda: qconv2d_int8(x, torch.ones(1), w, kernel_size=3, padding=1, keep_dense=True).numpy().tobytes()
want = convolve()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if convolve() == want else 1)
assert os.waitpid(child, 0)[1] == 0 and convolve() == want
"""


def test_a_forked_process_computes_too():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_runs_without_the_library(tmp_path: Path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LAYER], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was not built") == 1


def test_nothing_is_compiled_at_run_time_so_that_no_folder_has_to_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    code = """
import sys, torch
from gs_kernels import pack_weight, qmatmul, requantize
codes, scale, zero = torch.arange(-128, 128).repeat(512).to(torch.int8), torch.ones(1), torch.zeros(1)
y = requantize(codes, scale, zero, activation="hardswish")
assert torch.allclose(y, torch.nn.functional.hardswish(codes.float()), atol=1e-5)
weight = pack_weight(torch.full((64, 128), 3, dtype=torch.uint8), torch.ones(64, 2), 2.0, bits=4, group_size=64)
for rows in (1, 16):
    assert torch.equal(qmatmul(torch.ones(rows, 128), weight), torch.full((rows, 64), 128.0))
assert "torch._inductor.graph" not in sys.modules
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


CACHED = (instructions.has, instructions._level, instructions.instruction_set)


@pytest.fixture
def other_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def become(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
        aten = "AVX512" if any(name.startswith("avx512") for name in names) else "AVX2"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
        for function in CACHED:
            function.cache_clear()

    for name in ("GS_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    yield become
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


x86 = pytest.mark.skipif("avx2" not in compile.instruction_sets(), reason="names sets of x86-64")
NEW = (*instructions.AVX512, "avx512_vnni", "avx512_bf16") if "avx2" in compile.instruction_sets() else ()


@x86
@pytest.mark.parametrize("limit", ["ATen", "oneDNN", "ours", "none"])
def test_a_newer_cpu_plays_an_older_one(limit: str, other_cpu: Callable[..., None], monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2" if limit == "oneDNN" else "DEFAULT")
    monkeypatch.setenv("GS_CPU_ISA", "avx2" if limit == "ours" else "")
    other_cpu(*NEW)
    if limit == "ATen":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = instructions.instruction_set(), instructions.described()
    assert found == (("avx512_vnni", "AVX-512 VNNI BF16") if limit == "none" else ("avx2", "AVX2"))


@x86
def test_a_cpu_has_the_newest_set_of_which_it_has_all(other_cpu: Callable[..., None], monkeypatch):
    other_cpu()
    assert instructions.instruction_set() == "generic"
    other_cpu(*instructions.AVX2, "avx_vnni")
    assert (instructions.instruction_set(), instructions.described()) == ("avx_vnni", "AVX2 VNNI")
    other_cpu(*instructions.AVX512)
    assert instructions.instruction_set() == "avx512"
    other_cpu(*instructions.AVX2)
    monkeypatch.setenv("GS_CPU_ISA", "avx512")
    instructions.instruction_set.cache_clear()
    with pytest.raises(UnsupportedError, match=r"GS_CPU_ISA: must be one of generic, avx2 on this CPU, got 'avx512'"):
        instructions.instruction_set()
