"""Checks that ONNX Runtime predicts what our converted networks do: `python -m bench.onnx_runtime --epochs 1 --amp`.

Two networks, over the whole test set: that of `bench.accuracy` with the same options, from the same states, as 8-bit
QDQ, and an MLP with 4-bit weights as MatMulNBits. One row each says how far the logits are apart, and how many images
are predicted differently: of the graph as it was written, and of what ONNX Runtime makes of it by default, where it
rounds the biases of 8-bit layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gs_algos
from bench import accuracy, record
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.train import Interrupted, TrainConfig, predict, train
from gs_algos.demo.train import accuracy as top1
from gs_algos.export.onnx import export_onnx
from gs_algos.quant.packed.module import Packed

PACKED = {"QuantizeLinear", "DequantizeLinear", "MatMulNBits"}
BIAS_ROUNDING = "WeightBiasQuantization"
MLP_EPOCHS = 2
MLP_WEIGHTS = "int4@group:16"


def main(argv: list[str] | None = None) -> int:
    args = accuracy.parser_of("python -m bench.onnx_runtime", __doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        data = accuracy.first_images(load_data(args.data), args.train_images).to(torch.device(args.device))
        nets = {(args.model, args.setting): trained(args, data), ("mlp", MLP_WEIGHTS): mlp(args, data)}
    except (ValueError, Interrupted) as error:
        print(error, file=sys.stderr)
        return 2
    for (model, setting), net in nets.items():
        run = {"model": model, "recipe": setting, "data": data.name, "seed": args.seed}
        row = {**run, "epochs": MLP_EPOCHS if setting == MLP_WEIGHTS else args.epochs, **compare(net, data)}
        path = record.append(row, kind="onnx_runtime", device=args.device)
        print(f"{model}: {row['accuracy']}, {row['parity']}, {row['nbytes']}, {row['operators']}; recorded in {path}")
    return 0


def trained(args: argparse.Namespace, data: ImageData) -> nn.Module:
    """Trains the converted network of `bench.accuracy`."""
    stages = accuracy.Stages(args, data)
    net = stages.fresh()
    stages.train(f"float{args.float_epochs}", net, stages.base)
    return stages.compress(net)[0]


def mlp(args: argparse.Namespace, data: ImageData) -> nn.Module:
    """Makes three linear layers, trained as floats, then rounded to 4 bits."""
    torch.manual_seed(args.seed)
    inputs = data.channels * data.image_size**2
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 448), nn.ReLU(), nn.Linear(448, 224), nn.ReLU(), nn.Linear(224, data.classes)
    ).to(data.train_x.device)
    train(net, data, TrainConfig(MLP_EPOCHS, 1e-3, "adamw", args.batch_size, warmup=0.2, seed=args.seed))
    return gs_algos.quantize_weights(net.eval(), MLP_WEIGHTS, progress=False)


def compare(net: nn.Module, data: ImageData) -> dict[str, Any]:
    """Compares our logits with ONNX Runtime's of the exported network."""
    import onnx

    ours = predict(net, data)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(net, data.example().cpu(), Path(folder) / "net.onnx")
        written, default = run_onnx(path, data, [BIAS_ROUNDING]), run_onnx(path, data)
        weights = sum(module.weight.numel() for module in net.modules() if isinstance(module, Packed))
        nbytes = {"float_weights": 4 * weights, "onnx": sum(file.stat().st_size for file in Path(folder).iterdir())}
        operators = {node.op_type for node in onnx.load(path).graph.node}
    return {
        "accuracy": {"ours": top1(ours, data), "written": top1(written, data), "default": top1(default, data)},
        "parity": {"written": apart(ours, written), "default": apart(ours, default)},
        "nbytes": nbytes,
        "operators": sorted(operators & PACKED),
        "onnxruntime": version("onnxruntime"),
    }


def apart(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Compares as `bench.accuracy.parity`; median_relative, within_1e3: of images' differences, relative to RMS logits.

    A sum that two orders of addition put on two sides of a tie moves an 8-bit code by one: that is what the rest is.
    """
    each = (ours - theirs).square().mean(1).sqrt() / ours.square().mean(1).sqrt()
    spread = {"median_relative": each.median().item(), "within_1e3": int((each <= 1e-3).sum())}
    return {**accuracy.parity(ours, theirs), **spread}


def run_onnx(path: Path, data: ImageData, without: Sequence[str] = ()) -> Tensor:
    """Runs the test set on the CPU without these rewrites of the graph; returns its logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    where: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": list(without)}
    session = onnxruntime.InferenceSession(path, options, **where)

    class Session(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"x": x.contiguous().numpy()})[0])

    return predict(Session(), data.to(torch.device("cpu")))


if __name__ == "__main__":
    raise SystemExit(main())
