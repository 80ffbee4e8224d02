"""Times what we export of a converted network in ONNX Runtime, beside our own: same inputs, same threads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import time_cpu
from gs_algos.export.onnx import export_onnx
from gs_kernels.runtime.instructions import multiplies_int8

NEAR = 0.2  # a row is of the same network: ONNX Runtime rounds biases, and 50 random layers amplify a code that differs


def onnx_runtime_rows(net: nn.Module, x: Tensor, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the rows "latency" and "throughput" of a converted network on a CPU.

    Where there is VNNI its weights stay int8, which ONNX Runtime multiplies faster there, and wrongly elsewhere.

    Raises:
        RuntimeError: if it gives something else than the network.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(net, x[:2], Path(folder) / "net.onnx", signed_weights=multiplies_int8())
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nbytes = path.stat().st_size
    name = session.get_inputs()[0].name
    for phase, inputs in (("latency", x[:1]), ("throughput", x)):
        given = inputs.contiguous().numpy()
        with torch.inference_mode():
            ours, theirs = net(inputs), torch.from_numpy(session.run(None, {name: given})[0])
        error = float((ours - theirs).norm() / ours.norm())
        if not error <= NEAR:
            raise RuntimeError(f"bench.models: ONNX Runtime must give our outputs, got {error:.2g} of them off")
        timing = time_cpu(partial(session.run, None, {name: given}), seconds)
        times = {key: round(getattr(timing, key), 3) for key in ("ms_min", "ms_p20", "ms_p50", "ms_p80")}
        about = {"batch": len(inputs), "version": version("onnxruntime"), "nbytes": nbytes}
        yield {"phase": phase, **about, **times, "per_s": round(1e3 * len(inputs) / timing.ms_p50, 2)}
