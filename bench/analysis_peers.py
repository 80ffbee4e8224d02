"""Runs other tools' layer analysis, and ours, on one network: `python -m bench.analysis_peers --tool aimet`.

Runs in an environment that holds torch, this repository's packages and the tool: AIMET's aimet_torch with torchvision;
nncf, or ppq 0.6.6 with onnx 1.14, protobuf 3.20 and numpy 1.26, both with onnxruntime. ResNet-20 is trained once, into
`--weights`, and each tool then analyses it on the same 256 training images, at the bits that it is made for: a row says
what that took, how many layers got a number, and what was written. Of tools that give one number for each layer at 4
bits, Spearman's correlation says how well sums of these numbers predict the loss on test images of 40 networks in which
a random half of the weights is rounded.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import gs_algos
from bench import record
from bench.accuracy import first_images
from bench.sensitivity import loss_of, random_policies, rank_correlation, trained
from gs_algos.analysis.probe import Probe
from gs_algos.core.network import ordinary_tensors
from gs_algos.demo.data import ImageData, load_data
from gs_algos.demo.models import build
from gs_algos.demo.train import accuracy, predict

MODEL = "resnet20"
SEEN, BATCH = 256, 64  # training images that every tool sees
POLICIES = 40


@dataclass(frozen=True)
class Job:
    """Holds what a tool is given: the network, batches of images with labels, and a folder for what it writes."""

    net: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    out: Path


@dataclass(frozen=True)
class Tool:
    """Says how a tool is called.

    package: that it is installed as; "" for ours. bits: of weights and activations that it analyses. run: returns layer
    -> number, more for a layer that hurts more; nothing where the tool keeps them to itself.
    """

    package: str
    bits: str
    run: Callable[[Job], dict[str, float]]


def _analyze(job: Job) -> dict[str, float]:
    choices = ("int4@channel", "int8@channel")
    page = gs_algos.analyze(job.net, job.batches[0][0], job.batches, choices=choices, samples=SEEN)
    page.save(job.out / "page.html")
    assert page.sensitivity is not None
    return {site: next(iter(scores.values())) for site, scores in page.sensitivity.scores.items()}


def _report(job: Job) -> dict[str, float]:
    algo = gs_algos.SimQAT(weight="int4@channel", act="int8@tensor")
    new = algo.apply(copy.deepcopy(job.net), job.batches[0][0])
    algo.calibrate(new, [x for x, _ in job.batches])
    new = algo.convert(new.eval(), job.batches[0][0])
    page = gs_algos.report(job.net, new, job.batches, job.out / "page.html", samples=SEEN)
    assert page.comparison is not None
    return {one.float_site: -one.local_sqnr for one in page.comparison.layers if one.local_sqnr is not None}


def _aimet(job: Job) -> dict[str, float]:
    operators = _vision_operators()
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.common.utils import CallbackFunc
    from aimet_torch.quant_analyzer import QuantAnalyzer

    @torch.no_grad()
    def calibrate(net: Any, _: Any) -> None:
        for x, _y in job.batches:
            net(x)

    @torch.no_grad()
    def evaluate(net: Any, _: Any) -> float:
        return -sum(float(F.cross_entropy(net(x), y)) for x, y in job.batches) / len(job.batches)

    tool = QuantAnalyzer(job.net, job.batches[0][0][:1], CallbackFunc(calibrate), CallbackFunc(evaluate))
    tool.enable_per_layer_mse_loss([x for x, _ in job.batches], len(job.batches))
    tool.analyze(
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_param_bw=4,
        default_output_bw=8,
        config_file=get_path_for_per_channel_config(),
        results_dir=str(job.out),
    )
    whole = evaluate(job.net, None)
    found = json.loads((job.out / "per_layer_quant_enabled.json").read_text())
    del operators
    return {name: whole - score for name, score in found.items()}


def _vision_operators() -> torch.library.Library:
    """Declares, while its result lives, what torchvision's builds for GPUs need to import beside a torch for CPUs."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _nncf(job: Job) -> dict[str, float]:
    import nncf
    import onnx
    import onnxruntime

    def validate(model: Any, items: Any) -> tuple[float, list[float]]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = [-float(F.cross_entropy(torch.tensor(session.run(None, {"x": x.numpy()})[0]), y)) for x, y in items]
        return sum(values) / len(values), values

    images = nncf.Dataset(job.batches, lambda pair: {"x": pair[0].numpy()})
    labelled = nncf.Dataset(job.batches, lambda pair: pair)
    model = onnx.load(_exported(job))
    found = nncf.quantize_with_accuracy_control(model, images, labelled, validate, max_drop=0.0)
    onnx.save(found, job.out / "model.onnx")
    return {}


def _ppq(job: Job) -> dict[str, float]:
    from ppq import TargetPlatform, graphwise_error_analyse, layerwise_error_analyse
    from ppq.api import quantize_onnx_model

    images = [x for x, _ in job.batches]
    graph = quantize_onnx_model(
        onnx_import_file=str(_exported(job)),
        calib_dataloader=images,
        calib_steps=8,
        input_shape=list(images[0].shape),
        platform=TargetPlatform.PPL_CUDA_INT8,
        device="cpu",
        verbose=0,
    )
    given = {"graph": graph, "running_device": "cpu", "dataloader": images, "collate_fn": lambda x: x, "steps": 4}
    graphwise_error_analyse(**given)
    return dict(layerwise_error_analyse(**given))


def _exported(job: Job) -> Path:
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    x = job.batches[0][0]
    torch.onnx.export(job.net, (x,), str(path), input_names=["x"], output_names=["y"], dynamo=False, opset_version=13)
    return path


TOOLS = {
    "analyze": Tool("", "4", _analyze),
    "report": Tool("", "4 and 8", _report),
    "aimet": Tool("aimet-torch", "4 and 8", _aimet),
    "nncf": Tool("nncf", "8 and 8", _nncf),
    "ppq": Tool("ppq", "8 and 8", _ppq),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.analysis_peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="of the float network; trained if it is not there")
    parser.add_argument("--data", default="fashion-mnist", help="as golden-stick demo --data")
    parser.add_argument("--train-images", type=int, default=12_000, metavar="N", help="train on the first N only")
    parser.add_argument("--test-images", type=int, default=2000, help="that losses are measured on, at most")
    parser.add_argument("--epochs", type=int, default=3, help="of the float training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tool = TOOLS[args.tool]
    try:
        data = first_images(load_data(args.data), args.train_images)
        tool_version = version(tool.package) if tool.package else record.environment("cpu")["commit"]
    except (ValueError, OSError, ImportError) as error:
        print(f"bench.analysis_peers: {error}", file=sys.stderr)
        return 2
    net = _network(args.weights, data, args.epochs)
    x, y = data.normalize(data.train_x[:SEEN]), data.train_y[:SEEN]
    with tempfile.TemporaryDirectory() as folder, ordinary_tensors():
        job = Job(copy.deepcopy(net), list(zip(x.split(BATCH), y.split(BATCH), strict=True)), Path(folder))
        started = time.perf_counter()
        scores = tool.run(job)
        seconds = time.perf_counter() - started
        files = [path for path in job.out.rglob("*") if path.is_file()]
        pages = [path.read_text(errors="replace") for path in files if path.suffix == ".html"]
        row: dict[str, Any] = {
            "tool": args.tool,
            "version": tool_version,
            "network": MODEL,
            "data": data.name,
            "accuracy": round(accuracy(predict(net, data), data), 2),
            "bits": tool.bits,
            "samples": SEEN,
            "seconds": round(seconds, 1),
            "layers": len(scores),
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "loads_from_network": any("<script" in page and "https://" in page for page in pages),
        }
    if args.tool in ("analyze", "aimet"):
        row["correlation"] = round(_correlation(net, scores, data, args.test_images), 3)
    record.append(row, kind="analysis", device="cpu")
    print(row)
    return 0


def _network(path: Path, data: ImageData, epochs: int) -> nn.Module:
    if not path.is_file():
        save_file(trained(MODEL, data, epochs, 0).state_dict(), path)
    net = build(MODEL, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
    net.load_state_dict(load_file(path))
    return net.eval()


def _correlation(net: nn.Module, scores: dict[str, float], data: ImageData, images: int) -> float:
    """Correlates sums of layers' scores with the loss when a random half of the weights is rounded to 4 bits."""
    data = replace(data, test_x=data.test_x[:images], test_y=data.test_y[:images])
    probe = Probe(net, "bench.analysis_peers")
    sites = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear) and name in scores]
    policies = random_policies(sites, (4, 32), POLICIES, 0)
    rounded = [[site for site, bits in policy.items() if bits == 4] for policy in policies]
    losses = [loss_of(probe, dict.fromkeys(some, "int4@channel"), data) for some in rounded]
    return rank_correlation([sum(scores[site] for site in some) for some in rounded], losses)


if __name__ == "__main__":
    raise SystemExit(main())
