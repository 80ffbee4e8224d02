"""What AOTAutograd hands to a compiler for a GPU, on a machine without one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def pretend_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for Triton to compile for, as far as PyTorch asks when it traces a launch."""
    runtime = pytest.importorskip("triton.runtime", reason="Triton is not installed: there are no kernels")
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(runtime.driver, "_active", driver)


def traced_launches(run: Callable[..., Any], *args: Any) -> tuple[list[list[str]], set[str]]:
    """The results that each Triton launch writes, and the names of the ATen calls."""
    graph = make_fx(dispatch_functionalize(run))(*args).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    launches = [node.kwargs["tensors_to_clone"] for node in calls if "triton_kernel_wrapper" in str(node.target)]
    return launches, {str(node.target).split(".")[1] for node in calls if str(node.target).startswith("aten.")}
