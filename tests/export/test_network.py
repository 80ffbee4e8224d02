"""Converted networks as a compiled package and as ONNX: run by a process or library that does not know us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import PTQ, SimQAT, quantize_weights, save
from gs_algos.cli.app import run
from gs_algos.demo.data import load_data
from gs_algos.demo.models import build
from gs_algos.export.onnx import export_onnx, integer_weight
from gs_algos.export.torch_package import export_package
from gs_algos.quant.packed.module import Packed
from tests.helpers import relative_rms

RUN_PACKAGE = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("gs_kernels", "gs_algos"))]
assert torch.equal(run(x), y) and torch.equal(run(x[:2]), y[:2])
"""


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, x: torch.Tensor, **schemes: Any) -> nn.Module:
    """The network after SimQAT, as its ranges follow from x."""
    algo = SimQAT(**{"weight": "int8@channel", "act": "int8@tensor:ema"} | schemes)
    net = algo.apply(net, x)
    algo.calibrate(net, [x])
    return algo.convert(net.eval(), x)


def small(**schemes: Any) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)  # negative ones turn scales of the convolution negative
    net = nn.Sequential(
        conv, norm, nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    )
    return trained(net, images(), **schemes)


def predicted(path: Path, x: torch.Tensor, **entries: str) -> torch.Tensor:
    """y of a session of ONNX Runtime with these entries `session.<name>` in its options, else as it is by default."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it is in the dev extra")
    options = ort.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def operators(path: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(path).graph.node}


def test_a_package_runs_in_a_process_without_us(tmp_path: Path):
    torch.manual_seed(0)
    x = images()
    net = trained(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)), x)
    path = export_package(net, x, tmp_path / "net.pt2")
    torch.save((x, net(x).detach()), tmp_path / "io.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN_PACKAGE, path, tmp_path / "io.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"must be a new file that ends in \.pt2, got a file that is there"):
        export_package(net, x, path)


@pytest.mark.parametrize("weight", ["int4@channel", "int8@channel:asym", "int1@channel"])
def test_integer_weights_are_those_of_the_layer(weight: str):
    layers = [module for module in small(weight=weight).modules() if isinstance(module, Packed)]
    assert len(layers) == 3
    for layer in layers:
        codes, scale, zero = integer_weight(layer)
        assert codes.dtype == (torch.int8 if zero is None else torch.uint8)
        assert bool((scale > 0).all())
        column = (-1, *[1] * (codes.dim() - 1))
        whole = codes.float() if zero is None else codes.float() - zero.float().view(column)
        assert torch.equal(whole * scale.view(column), layer.weight)


@pytest.mark.parametrize(
    "schemes",
    [{}, {"weight": "int4@channel", "act": "uint4@tensor:ema:asym"}, {"weight": "int8@channel:asym"}, {"act": None}],
    ids=str,
)
def test_onnx_runtime_agrees(schemes: dict[str, Any], tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    net, x = small(**schemes), images(16)
    path = export_onnx(net, x, tmp_path / "net.onnx")
    with torch.no_grad():
        assert relative_rms(predicted(path, x), net(x)) < 1e-3
        assert relative_rms(predicted(path, x[:1]), net(x[:1])) < 1e-3
    wanted = {"QuantizeLinear", "DequantizeLinear"} if schemes.get("act", "") is not None else {"MatMulNBits", "Conv"}
    assert wanted <= operators(path)


def fused(**schemes: Any) -> nn.Module:
    """Layers between ReLUs: ONNX Runtime multiplies integers in all but the last."""
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(2, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.Conv2d(16, 8, 1),
    ):
        layers += [conv, nn.ReLU()]
    return trained(nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5)), images(16), **schemes)


def integer_weights(path: Path) -> dict[str, torch.Tensor]:
    """The initializers of more than one dimension that are integers."""
    import onnx
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: torch.from_numpy(a.copy()) for name, a in found.items() if a.dtype.kind in "iu" and a.ndim > 1}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """`fused` networks and their files, by the scheme of their weights."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    folder, x = tmp_path_factory.mktemp("exports"), images(16)
    nets = {weight: fused(weight=weight) for weight in ("int8@channel", "int8@channel:asym", "int4@channel")}
    return {
        weight: (net, export_onnx(net, x, folder / f"{weight[:4]}{len(weight)}.onnx")) for weight, net in nets.items()
    }


@pytest.mark.parametrize("weight", ["int8@channel", "int8@channel:asym", "int4@channel"])
def test_no_pair_of_products_can_saturate_16_bits(weight: str, exports: dict[str, tuple[nn.Module, Path]]):
    weights = integer_weights(exports[weight][1])
    assert len(weights) == 5
    for codes in weights.values():
        # x86 without VNNI adds 255 * (w1 + w2) of int8 weights in int16, and of uint8 weights in int32
        assert codes.dtype == torch.uint8 or 2 * 255 * int(codes.int().abs().max()) < 2**15


@pytest.mark.parametrize("weight", ["int8@channel", "int8@channel:asym", "int4@channel"])
@pytest.mark.parametrize("entries", [{}, {"x64quantprecision": "1"}, {"qdqisint8allowed": "1"}], ids=str)
def test_sessions_of_every_kind_agree(weight: str, entries: dict[str, str], exports: dict[str, tuple[nn.Module, Path]]):
    (net, path), x = exports[weight], images(16)
    with torch.no_grad():
        assert relative_rms(predicted(path, x, **entries), net(x)) < 5e-3


def test_few_bits_are_spread_so_that_a_bias_is_rounded_finely(exports: dict[str, tuple[nn.Module, Path]]):
    for codes in integer_weights(exports["int4@channel"][1]).values():
        assert codes.dtype == torch.int8
        assert bool((codes % 8 == 0).all())
        assert int(codes.int().abs().max()) in (56, 64)


def test_signed_weights_are_kept_for_those_who_ask(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    path = export_onnx(fused(), images(16), tmp_path / "net.onnx", signed_weights=True)
    assert {codes.dtype for codes in integer_weights(path).values()} == {torch.int8}


def test_onnx_rounds_to_a_grid_whose_zero_point_is_no_code(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    net, x = small(act="int8@tensor:lsq"), images(16)
    grid = net[3].input_quantizer
    grid.zero.fill_(-146)
    grid.refresh_zero_point()
    path = export_onnx(net, x, tmp_path / "net.onnx")
    with torch.no_grad():
        assert relative_rms(predicted(path, x), net(x)) < 1e-3


@pytest.mark.parametrize("weights", ["int2@group:32", "int4@group:32:asym", "int8@channel"])
def test_packed_linears_become_matmul_nbits(weights: str, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 10, bias=False)).eval()
    net, x = quantize_weights(net, weights, progress=False), torch.randn(6, 64)
    path = export_onnx(net, x, tmp_path / "net.onnx")
    assert "MatMulNBits" in operators(path)
    assert "MatMul" not in operators(path)
    with torch.no_grad():
        assert relative_rms(predicted(path, x), net(x)) < 1e-5


@pytest.mark.parametrize("weight", ["int4@group:32", "int8@channel"])
def test_rows_rounded_as_they_come_are_rounded_in_onnx(weight: str, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(16, 64)
    x[3] = 0
    algo = PTQ(weight=weight, act="int8@token", rounding="nearest")
    net = algo.convert(algo.apply(net, x))
    got = predicted(export_onnx(net, x, tmp_path / "net.onnx"), x)
    with torch.no_grad():
        assert relative_rms(got, net(x)) < 1e-5


def test_the_command_exports_what_the_demo_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra onnx")
    data = load_data("digits")
    torch.manual_seed(0)
    net = build("lenet5", in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
    x = data.normalize(data.test_x[:64])
    net = trained(net, x)
    save(net, tmp_path / "demo" / "model")
    (tmp_path / "demo" / "demo.json").write_text(json.dumps({"data": "digits", "model": "lenet5", "image_size": 64}))
    assert run(["export", str(tmp_path / "demo"), str(tmp_path / "net.onnx"), "--to", "onnx"]) == 0
    with torch.no_grad():
        assert relative_rms(predicted(tmp_path / "net.onnx", x), net(x)) < 1e-5


def test_other_folders_and_missing_libraries_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run(["export", str(tmp_path), str(tmp_path / "x.pt2"), "--to", "pt2"]) == 2
    assert "must be a folder that golden-stick demo wrote" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs onnx, onnxscript; pip install 'golden-stick-triton\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), torch.ones(2, 2), tmp_path / "x.onnx")
