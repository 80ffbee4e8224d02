"""Measures the CPU time of calls up to the driver, without a GPU: `python -m bench.launches`.

Everything is as on a GPU but for two ends. Tensors lie in CPU memory, and `gs_kernels.runtime.device` is told that they
do not. The driver, libcuda, is a library of functions that do nothing: kernels are compiled for sm_90 by ptxas, loaded
into it and launched through Triton's own launchers in C. A real GPU adds the driver's part of a launch (some 2 us of
`cuLaunchKernelEx`) and the allocator of CUDA in the place of malloc.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gs_algos.quant.packed import module
from gs_kernels.runtime import device
from gs_kernels.runtime.device import Capabilities

H200 = Capabilities("NVIDIA H200", 90, 132)

# what has to answer; every other function returns 0 without looking
ANSWERS = """
#include <stdint.h>
long gs_launches;
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 232448; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = 1024; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
int cuPointerGetAttribute(void *v, int a, uint64_t p) { *(uint64_t *)v = p; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = (void *)16; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)32; return 0; }
int cuStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
int cuLaunchKernelEx(const void *c, void *f, void **p, void **e) { ++gs_launches; return 0; }
"""


def build_libcuda(folder: Path) -> ctypes.CDLL:
    """Compiles and loads a libcuda.so.1 that has the functions which Triton's driver names."""
    import triton

    text = (Path(triton.__file__).parent / "backends/nvidia/driver.c").read_text()
    names = set(re.findall(r"\bcu[A-Z]\w*(?=\()", text)) - set(re.findall(r"\b(cu\w+)\(", ANSWERS))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(ANSWERS + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True
    )
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its soname, whoever opens it later


@contextlib.contextmanager
def pretended_gpu() -> Iterator[ctypes.CDLL]:
    """Makes CPU tensors count as those of an H200 inside, and kernels launch into the library that is given."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.knobs import nvidia
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = {-1: 0, 0: 0}.get

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library = build_libcuda(Path(folder))
        nvidia.libcuda_path = folder
        before = driver._active
        driver.set_active(Driver())
        stack.callback(driver.set_active, before)
        patch = mock.patch.object
        stack.enter_context(patch(device, "on_gpu", torch.Tensor.is_cpu.__get__))  # type: ignore[attr-defined]
        stack.enter_context(patch(module, "KERNEL_DEVICES", ("cpu",)))  # the layout of codes in layers
        stack.enter_context(patch(device, "current_index", itertools.repeat(-1).__next__))
        stack.enter_context(patch(device, "capturing", lambda: False))
        stack.enter_context(patch(device, "capabilities", lambda index=0: H200))
        yield library


def cases() -> dict[str, Callable[[], Any]]:
    """Names the calls that are measured: small ones, of which the CPU's part is most."""
    from gs_algos.quant.packed.conv import PackedConv
    from gs_algos.quant.packed.linear import PackedLinear
    from gs_kernels import (
        PerChannel,
        PerGroup,
        code_sums,
        fake_quant,
        pack_weight,
        qconv2d,
        qconv2d_int8,
        qmatmul,
        qmatmul_int8,
        quantize_rows,
    )

    generator = torch.Generator().manual_seed(0)

    def weight(n: int, k: int, group: int) -> Any:
        w = torch.randn(n, k, generator=generator)
        scale = w.view(n, -1, group).abs().amax(2) / 7
        codes = (w.view(n, -1, group) / scale[..., None]).round().clamp(-8, 7).view(n, k) + 8
        return pack_weight(
            codes.to(torch.uint8), scale.to(torch.bfloat16), 8.0, bits=4, group_size=group, layout="planar"
        )

    bf16 = torch.bfloat16
    split, whole = weight(512, 4096, 128), weight(512, 256, 128)
    layer = PackedLinear.from_packed(split, torch.zeros(512), bf16).eval()
    layer_whole = PackedLinear.from_packed(whole, torch.zeros(512), bf16).eval()
    x, x_whole = torch.randn(1, 4096).to(bf16), torch.randn(1, 256).to(bf16)
    rows = torch.randn(64, 256).to(bf16)
    image = torch.randn(1, 64, 14, 14).to(bf16).to(memory_format=torch.channels_last)
    filters = weight(64, 576, 576)
    values = torch.randn(512, 512).to(bf16)
    step, zero = torch.full((512,), 0.1), torch.zeros(512)
    steps, zeros = torch.full((512 * 4,), 0.1), torch.zeros(512 * 4)
    codes, scale = torch.ones(1, 256, dtype=torch.int8), torch.ones(1)
    geometry: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    geometry |= {"padding_mode": "zeros", "pad": [1, 1, 1, 1]}
    conv = PackedConv(filters, geometry, (64, 3, 3), torch.zeros(64), bf16).eval()
    pixels, x_zero, sums = image.to(torch.int8), torch.zeros(1), code_sums(filters)
    linear = torch.nn.Linear(256, 512, dtype=bf16)
    return {
        "PackedLinear, 1 row, K in parts (2 launches)": lambda: layer(x),
        "PackedLinear, 1 row": lambda: layer_whole(x_whole),
        "PackedLinear, 64 rows": lambda: layer_whole(rows),
        "qmatmul, 1 row": lambda: qmatmul(x_whole, whole),
        "qmatmul_int8, 1 row": lambda: qmatmul_int8(codes, scale, whole),
        "quantize_rows, 1 row": lambda: quantize_rows(x_whole),
        "PackedConv, 14x14x64": lambda: conv(image),
        "qconv2d, 14x14x64": lambda: qconv2d(image, filters, kernel_size=3, padding=1),
        "qconv2d_int8, 14x14x64, zero point": lambda: qconv2d_int8(
            pixels, scale, filters, kernel_size=3, padding=1, x_zero=x_zero, code_sums=sums
        ),
        "fake_quant by row": lambda: fake_quant(values, step, zero, qmin=-8, qmax=7, granularity=PerChannel(0)),
        "fake_quant by group": lambda: fake_quant(values, steps, zeros, qmin=-8, qmax=7, granularity=PerGroup(128)),
        "nn.Linear on the CPU, for scale": lambda: linear(x_whole),
    }


def measure(call: Callable[[], Any], seconds: float) -> float:
    """Returns the least microseconds of CPU time of a call, of rounds of 50."""
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.thread_time()
        for _ in range(50):
            call()
        best = min(best, (time.thread_time() - start) / 50)
    return best * 1e6


def count_calls(call: Callable[[], Any]) -> tuple[int, int]:
    """Counts the calls of functions in Python and in C that a call makes."""
    counts = {"call": 0, "c_call": 0}

    def note(frame: Any, event: str, arg: Any) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counts["call"] - 1, counts["c_call"] - 1  # the lambda, and setprofile


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each call (default %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="calls whose name holds this text")
    options = parser.parse_args(argv)
    import triton

    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'call':<46}{'us':>7}{'launches':>10}{'frames':>8}{'C calls':>9}")
    with pretended_gpu() as library, torch.no_grad():
        launches = ctypes.c_long.in_dll(library, "gs_launches")
        for name, call in cases().items():
            if options.only not in name:
                continue
            for _ in range(3):
                call()
            before = launches.value
            call()
            made = launches.value - before
            us = measure(call, options.seconds)
            frames, c_calls = count_calls(call)
            print(f"{name:<46}{us:7.1f}{made:10}{frames:8}{c_calls:9}", flush=True)


if __name__ == "__main__":
    main()
