"""Private names of PyTorch are used in one file, and all of them are there."""

import re
from pathlib import Path

import pytest
import torch

from gs_kernels.runtime import torch_private

ROOT = Path(__file__).parents[3]
PRIVATE = re.compile(
    r"(?<!`)\btorch(?:\.(?!ops\b)\w+)*\._(?!_)\w+"  # torch._int_mm, but operators and dunders
    r"|from torch(?:\.\w+)*\._\w[\w.]* import|import _[A-Z]"
)


@pytest.mark.parametrize("package", ["gs_kernels", "gs_algos"])
def test_no_other_file_uses_one(package):
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        lines = [] if path.name == "torch_private.py" else path.read_text().splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if PRIVATE.search(line) and "torch_private" not in line and not is_prose(line)
        ]
    assert not found, "\n".join(["use gs_kernels/runtime/torch_private.py instead of:", *found])


def is_prose(line):
    """A message or docstring that tells users what to call."""
    return "call it with torch." in line


def test_what_is_imported_late_is_there():
    assert torch_private.keeps_triton_ops() is False


def test_eager_means_real_tensors_of_the_given_types_outside_any_tracing():
    class Own(torch.Tensor):
        pass

    x = torch.ones(2)
    assert torch_private.is_eager(x, torch.nn.Parameter(x)) and not torch_private.is_eager(x.as_subclass(Own))
    assert torch_private.is_eager(x.as_subclass(Own), plain=torch_private.PLAIN | {Own})
    seen = []
    torch.jit.trace(lambda t: seen.append(torch_private.is_eager(x)) or t + 1, x, check_trace=False)
    assert seen == [False]
    assert torch_private.transform_of() is None
    torch.func.vmap(lambda t: seen.append(torch_private.transform_of()) or t + 1)(x)
    assert seen[-1] is not None


def test_a_tensor_that_shares_memory_is_a_view():
    x = torch.ones(2, requires_grad=True)
    assert torch_private.is_view(x[:1]) and not torch_private.is_view(x)
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.wants_tangents()
    assert not torch_private.wants_tangents()
