"""Compiles every kernel that the plan launches, without a GPU, and tells which of them a cache has already.

`python -m bench.gpu.precompile TARGET SHORTLIST HOW` is what a run does beside its first steps: it counts, in JSON,
what is in the cache at TRITON_CACHE_DIR, then compiles the rest on all cores unless HOW is "count".
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.gpu import archive, conformance
from bench.gpu.ceilings import DRY_CARD
from bench.gpu.cuda_stub import build_stub, take_stub, use_driver
from bench.gpu.items import Context
from bench.gpu.keys import settle_keys
from bench.gpu.plan import Step, steps
from gs_kernels.aot.collect import Specialization, collect_launches
from gs_kernels.tuning.gpu_specs import assumed

ARCHIVE = "cache.tar.gz"
LAUNCHER = "*/__triton_launcher*.so"


@dataclass
class Compiled:
    """Counts kernels. hits: were in the cache. made: were compiled. failed: why others were not, by kernel."""

    hits: int = 0
    made: int = 0
    failed: list[str] = field(default_factory=list)


def calls_of(plan: Sequence[Step], shortlist: Path | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields what the items of a plan launch, as calls with meta tensors, each with the name of its item."""
    context = Context("meta", 0.0, Path(), shortlist=shortlist)
    for step in plan:
        for item in step.items:
            yield item.id, lambda item=item: item.launch(context)  # type: ignore[misc]
        if step.tests:
            yield from (("conformance", call) for call in conformance.launches())


def kernels_of(
    calls: Iterable[tuple[str, Callable[[], None]]], target: str
) -> tuple[list[Specialization], dict[str, str]]:
    """Returns the kernels that calls launch, each once, and why calls failed, by their names.

    Tiles are those that rules choose on the card of the plan, if it is of this target, else on a typical one.
    """
    failed = {}
    settle_keys()
    with collect_launches(target) as kernels, assumed(DRY_CARD):
        for name, call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001  one call that cannot be made costs its own kernels only
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return kernels, failed


def is_cached(kernel: Specialization) -> bool:
    """Returns whether Triton would take a kernel from its cache: asked by its own key, nothing is compiled."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager

    source = ASTSource(kernel.fn, kernel.signature, kernel.constexprs, kernel.attrs)
    backend = make_backend(kernel.target)
    options = backend.parse_options(dict(kernel.options.__dict__))  # as the compiler does once more
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"
    found = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name) or {}
    return name in found


_builds_launchers = False  # in a process of the pool


def _start(stub: Path | None) -> None:
    global _builds_launchers
    torch.set_num_threads(1)
    settle_keys()
    if stub is not None:
        take_stub(stub)
    elif torch.cuda.is_available():
        use_driver()
    else:
        return
    _builds_launchers = True


def _compile(kernel: Specialization) -> str:
    """Compiles a kernel and its launcher; returns why not, or nothing."""
    try:
        compiled = kernel.compile()
        if _builds_launchers:
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # noqa: BLE001  one kernel that fails is a line, and not the end of the others
        return f"{kernel.name}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def compile_all(
    kernels: Sequence[Specialization], jobs: int, stub: Path | None, tell: Callable[[int, int], None] | None = None
) -> Compiled:
    """Compiles what the cache does not have, in processes, with launchers; those of kernels that it has are made too.

    Args:
        stub: the library that launchers are linked with; None takes the driver of the machine, if it has one.
        tell: told how many kernels are done, of how many.
    """
    missing = [not is_cached(kernel) for kernel in kernels]
    found = Compiled(hits=missing.count(False))
    with _compilers(jobs, stub) as compiled:
        for i, why in enumerate(compiled(_compile, kernels)):
            if why:
                found.failed.append(why)
            else:
                found.made += missing[i]
            if tell is not None:
                tell(i + 1, len(kernels))
    return found


@contextmanager
def _compilers(jobs: int, stub: Path | None) -> Iterator[Callable[..., Iterable[str]]]:
    """Yields what maps a function over kernels: in processes, or with one job in this process."""
    if jobs == 1:
        _start(stub)
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start, initargs=(stub,)) as pool:
        yield pool.map


def about(target: str) -> dict[str, Any]:
    """Returns what a cache depends on; the key of a kernel holds more, and decides."""
    commit = record.environment("cpu")["commit"]
    return {"target": target, "triton": version("triton"), "python": platform.python_version(), "commit": commit}


def precompile(
    folder: Path, target: str, jobs: int, shortlist: Path | None = None, plan: Sequence[Step] | None = None
) -> int:
    """Fills a cache in the folder, packs it, prints counts; returns the exit code: 1 if a kernel failed."""
    start = time.monotonic()
    cache = folder.absolute() / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    kernels, failed = kernels_of(calls_of(steps() if plan is None else plan, shortlist), target)
    print(f"{len(kernels)} kernels for {target}, {jobs} processes -> {cache}", flush=True)
    stub = None
    if not torch.cuda.is_available():
        try:
            stub = build_stub(folder.absolute() / "stub")
        except RuntimeError as error:
            print(f"launchers are left to the device: {error}")

    def tell(done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            print(f"{done} of {total}, {time.monotonic() - start:.0f} s", flush=True)

    found = compile_all(kernels, jobs, stub, tell)
    launchers = len(list(cache.glob(LAUNCHER)))
    made = about(target) | {"kernels": len(kernels) - len(found.failed), "launchers": launchers}
    files = archive.pack(cache, folder / ARCHIVE, made)
    for name, why in (*failed.items(), *(why.partition(": ")[::2] for why in found.failed)):
        print(f"left out: {name}: {why}")
    size = (folder / ARCHIVE).stat().st_size / 1e6
    print(
        f"{found.hits} kernels were in the cache, {found.made} compiled, {len(found.failed)} failed; "
        f"{launchers} launchers; {files} files, {size:.1f} MB, {time.monotonic() - start:.0f} s -> {folder / ARCHIVE}"
    )
    return int(bool(failed or found.failed))


def main(target: str, shortlist: Path | None, jobs: int, count_only: bool) -> None:
    start = time.monotonic()
    kernels, failed = kernels_of(calls_of(steps(), shortlist), target)
    missing = [kernel for kernel in kernels if not is_cached(kernel)]
    launchers = len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob(LAUNCHER)))
    counts = {"hits": len(kernels) - len(missing), "misses": len(missing), "launchers": launchers, "failed": failed}
    print(json.dumps({"event": "counted", **counts, "seconds": round(time.monotonic() - start, 1)}), flush=True)
    if missing and not count_only:
        found = compile_all(missing, jobs, None)
        seconds = round(time.monotonic() - start, 1)
        print(
            json.dumps({"event": "compiled", "made": found.made, "failed": found.failed, "seconds": seconds}),
            flush=True,
        )


if __name__ == "__main__":
    _target, _shortlist, _count_only = sys.argv[1:4]
    main(_target, Path(_shortlist) if _shortlist else None, os.cpu_count() or 1, _count_only == "count")
