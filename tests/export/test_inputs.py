"""What networks are exported for: several inputs and outputs, and what is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SCOP, SimQAT
from gs_algos.export.onnx import export_onnx
from gs_algos.export.torch_package import export_package
from gs_kernels import UnsupportedError
from tests.helpers import relative_rms

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
EXPORTS: dict[str, Callable[..., Path]] = {".onnx": export_onnx, ".pt2": export_package}


class Joined(nn.Module):
    """`{"hidden": x A + y, "logits": hidden * mask B}`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, *, mask: torch.Tensor) -> Any:
        hidden = self.a(x) if y is None else self.a(x) + y
        return {"hidden": hidden, "logits": self.b(hidden * mask)}


def converted(example: Any) -> nn.Module:
    torch.manual_seed(0)
    algo = SimQAT()
    net = algo.apply(Joined(), example)
    algo.calibrate(net, [example])
    return algo.convert(net.eval(), example)


@pytest.mark.parametrize("names", [("x", "y", "mask"), ("x", "mask")], ids=" ".join)
def test_onnx_has_every_input_and_output_by_name(names: tuple[str, ...], tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the dev extra")
    example = {name: X if name != "mask" else torch.arange(8.0) for name in names}
    net = converted(example)
    session = ort.InferenceSession(export_onnx(net, example, tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs() if i.name != "mask"] == [
        (name, ["batch", 8]) for name in names if name != "mask"
    ]
    assert [o.name for o in session.get_outputs()] == ["hidden", "logits"]
    less = {name: t if name == "mask" else t[:1] for name, t in example.items()}
    got = session.run(None, {name: t.numpy() for name, t in less.items()})
    with torch.no_grad():
        for y, want in zip(got, net(**less).values(), strict=True):
            assert relative_rms(torch.from_numpy(y), want) < 1e-3


class Doubled(nn.Module):
    def forward(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(2 * part for part in parts)


def test_positional_inputs_and_outputs_are_numbered(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    import onnx

    graph = onnx.load(export_onnx(Doubled(), (X, X + 1), tmp_path / "net.onnx")).graph
    assert [i.name for i in graph.input] == ["parts0", "parts1"]
    assert [o.name for o in graph.output] == ["y0", "y1"]


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (3, ValueError, r"example must be a tensor, a tuple of tensors .* or a dict .*, got int"),
    "an array": (X.numpy(), ValueError, "example must be a tensor, .* got ndarray"),
    "numbers in a tuple": ((X, 3), ValueError, "example must be a tensor, .* got a tuple with int"),
    "nothing": ((), ValueError, "example must be a tensor, .* got a tuple with nothing"),
    "one row": (X[:1], ValueError, r"batch of at least 2, got \[1, 8\]"),
    "another width": (torch.ones(4, 9), ValueError, "the inputs must run through the model, got"),
    "too many inputs": ((X, X), ValueError, "the inputs must run through the model, got TypeError"),
}


@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize("case", WRONG)
def test_another_example_is_refused(case: str, suffix: str, tmp_path: Path):
    example, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        EXPORTS[suffix](nn.Linear(8, 2), example, tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


def prepared_by_simqat() -> nn.Module:
    return SimQAT().apply(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), X)


def prepared_by_scop() -> nn.Module:
    net = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    return SCOP(rate=0.5).apply(net, X)


@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize("make", [prepared_by_simqat, prepared_by_scop, lambda: nn.Sequential(prepared_by_simqat())])
def test_a_network_in_training_is_to_be_converted_first(make: Callable[[], nn.Module], suffix: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"must be converted or float, got one that (simqat|scop) prepared.*convert it"
    ):
        EXPORTS[suffix](make(), X, tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, 8) + 1


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_network_for_one_batch_only_is_refused_in_one_line(suffix: str, tmp_path: Path):
    with pytest.raises(
        UnsupportedError, match=r"torch\.export must be able to read the network for any batch"
    ) as refused:
        EXPORTS[suffix](Fixed(), X, tmp_path / f"net{suffix}")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(suffix: str, tmp_path: Path):
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").write_text("text")
    for target, words in ((f"folder{suffix}", "got a folder that is there"), (f"file/net{suffix}", "which is a file")):
        with pytest.raises(ValueError, match=words):
            EXPORTS[suffix](nn.Linear(8, 2), X, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def test_pixels_go_with_one_input(tmp_path: Path):
    with pytest.raises(ValueError, match="pixels go with a network of one input and one output, got parts0, parts1"):
        export_package(Doubled(), (X, X), tmp_path / "net.pt2", pixels=((0.5,), (0.5,)))
