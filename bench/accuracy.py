"""Trains a float network, compresses it, and records what that cost: `python -m bench.accuracy --model resnet20 ...`.

One row holds every accuracy on the whole test set, always of the last epoch (no epoch is picked): the float network,
the same network trained on in float for the epochs that quantized training takes (the fair opponent), the trained
fake-quantized network, the converted one, and the one that was saved and loaded again.
Each stage keeps its state under `--state`, so an interrupted run continues and a second setting reuses the float one.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gs_algos
from bench import record
from gs_algos.analysis.operations import count_operations
from gs_algos.cli.compress import train_compressed
from gs_algos.core.algorithm import evaluating
from gs_algos.core.memory import nbytes_of, peak_bytes
from gs_algos.core.registry import algorithm_class
from gs_algos.core.timing import forward_ms
from gs_algos.demo.data import ImageData, batches_per_epoch, load_data
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.train import Interrupted, TrainConfig, accuracy, predict, train
from gs_algos.demo.training_defaults import float_training, tuning_training

CALIBRATED = 512  # images


@dataclass(frozen=True)
class Setting:
    """Holds an algorithm with its options.

    Args:
        far: it trains at the float run's learning rate, not at that of fine-tuning.
        after: the setting whose converted network it starts from; None: the float one.
        distill: options of the Distill around it, whose teacher is the network that it starts from; None: no Distill.
        longer: the teacher is the float network that was trained on for as many epochs.
    """

    algorithm: str
    options: dict[str, Any]
    far: bool = False
    after: str | None = None
    distill: dict[str, Any] | None = None
    longer: bool = False


def _search(weight: str, act: str | None = None, **options: Any) -> Setting:
    """Makes an SLB for a short training: the temperature falls in every step, from where logits move like weights."""
    short = {"t0": 12.0, "t_start": 0.0, "t_end": 0.9, "t_final": 1200.0}
    return Setting("slb", {"weight": weight, "act": act, **short, **options}, far=True)


SETTINGS = {
    "simqat-w8a8": Setting("simqat", {"weight": "int8@channel", "act": "int8@tensor:ema"}),
    "simqat-w2a8": Setting("simqat", {"weight": "int2@channel", "act": "int8@tensor:ema"}),
    "simqat-w4a8": Setting("simqat", {"weight": "int4@channel", "act": "int8@tensor:ema"}),
    **{f"slb-w{bits}": _search(f"{bits}bit@channel") for bits in (4, 2, 1)},
    **{f"slb-w{bits}a8": _search(f"{bits}bit@channel", "int8@tensor:ema") for bits in (4, 2, 1)},
    "ptq-w8a8": Setting("ptq", {"weight": "int8@channel", "act": "int8@tensor"}),
    "ptq-w4a8": Setting("ptq", {"weight": "int4@channel:mse", "act": "int8@tensor"}),
    "scop-45": Setting("scop", {"rate": 0.45}, far=True),
    **{f"{by}-45": Setting("prune", {"rate": 0.45, "importance": by}, far=True) for by in ("l2", "random")},
    "uniprune-32": Setting("uniprune", {"budget": "31.74% flops", "round_to": 4}, far=True),  # what rate 0.45 leaves
    "uniprune-60": Setting("uniprune", {"budget": "60% flops", "round_to": 16}, far=True),
    "l2-60": Setting("prune", {"budget": "60% flops", "round_to": 16, "importance": "l2"}, far=True),
    "heads-50": Setting("heads", {"rate": 0.5}),
    "heads-50-gradient": Setting("heads", {"rate": 0.5, "importance": "gradient"}),
    "ghost-2": Setting("ghost", {"ratio": 2, "force": True}, far=True),
    "ghost-2-random": Setting("ghost", {"ratio": 2, "force": True, "fit": False}, far=True),
    "ghost-2-simqat-w8a8": Setting("simqat", {"weight": "int8@channel", "act": "int8@tensor:ema"}, after="ghost-2"),
    "adder": Setting("adder", {}, far=True),
    "adder-int8": Setting("adder", {"int8": True}, far=True),
    "scop-45-simqat-w8a8": Setting("simqat", {"weight": "int8@channel", "act": "int8@tensor:ema"}, after="scop-45"),
    "scop-45-slb-w2": replace(_search("2bit@channel"), after="scop-45"),
    "slb-w4a4": _search("4bit@channel", "uint4@tensor:pact", rules=(("re:stem.*|embed", {"act": "int8@tensor:ema"}),)),
}
PKKD = {"train_teacher": True, "features": 1.0, "kind": "kernel"}  # a twin beside, compared through kernels
TEACHERS: dict[str, dict[str, Any]] = {"distill": {}, "distill-t1": {"temperature": 1.0}}
SETTINGS |= {
    f"{prefix}-{name}": replace(SETTINGS[name], distill=options)
    for prefix, options in TEACHERS.items()
    for name in ("simqat-w2a8", "slb-w1", "scop-45", "ghost-2", "adder")
}
SETTINGS |= {
    f"distill-longer-{name}": replace(SETTINGS[name], distill=TEACHERS["distill-t1"], longer=True)
    for name in ("simqat-w2a8", "slb-w1", "scop-45")
}
SETTINGS["pkkd-adder"] = replace(SETTINGS["adder"], distill=PKKD)


def main(argv: list[str] | None = None) -> int:
    args = parser_of("python -m bench.accuracy", __doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    try:
        data = first_images(load_data(args.data), args.train_images, args.test_images).to(device)
        row = measure(args, data)
    except (ValueError, Interrupted) as error:
        print(error, file=sys.stderr)
        return 2
    path = record.append(row, kind="accuracy", device=args.device)
    print(f"recorded in {path}")
    return 0


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """Makes the parser of the options of a run of `Stages`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--data", default="fashion-mnist", help="as golden-stick demo --data")
    parser.add_argument(
        "--train-images", type=int, metavar="N", help="train on the first N only, for a deep network; tests on all"
    )
    parser.add_argument("--test-images", type=int, metavar="N", help="test on the first N only, where time is short")
    parser.add_argument(
        "--setting", "--recipe", choices=SETTINGS, default="simqat-w8a8", help="algorithm and options (once --recipe)"
    )
    parser.add_argument("--float-epochs", type=int, default=10)
    parser.add_argument(
        "--epochs",
        type=int,
        default=4,
        help="of quantized training, and of the float run it is held to; 0: calibrate only",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--amp", action="store_true", help="quantized training under bfloat16 autocast")
    parser.add_argument("--float-amp", action="store_true", help="the float trainings too")
    parser.add_argument("--state", type=Path, default=Path("build/accuracy"), help="where training states are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def first_images(data: ImageData, train: int | None, test: int | None = None) -> ImageData:
    """Returns the set with its first so many images, None for all of them; its name then says how many."""
    for count, images, option in ((train, data.train_x, "--train-images"), (test, data.test_x, "--test-images")):
        if count is not None and not 1 <= count <= len(images):
            raise ValueError(f"{option}: must be in 1..{len(images)} for {data.name}, got {count}")
    told = [f"{count:,} to {what}" for count, what in ((train, "train"), (test, "test")) if count is not None]
    name = f"{data.name} ({', '.join(told)})" if told else data.name
    own = replace(data, name=name, train_x=data.train_x[:train], train_y=data.train_y[:train])
    return replace(own, test_x=data.test_x[:test], test_y=data.test_y[:test])


class Stages:
    """Runs the trainings of a run, or reads each from the state that it left.

    seconds: of each; started: when the run was.
    """

    def __init__(self, args: argparse.Namespace, data: ImageData) -> None:
        self.args, self.data = args, data
        set_name = args.data.partition(":")[0] + (f"-{args.train_images}" if args.train_images else "")
        self.stem = f"{args.model}-{set_name}-s{args.seed}"
        base = float_training(args.model, data, args.float_epochs, args.seed, args.batch_size)
        tune = tuning_training(args.model, data, args.epochs, args.seed, args.batch_size)
        self.base, self.tune = (replace(config, amp=args.float_amp) for config in (base, tune))
        far = SETTINGS[args.setting].far
        self.compressed = replace(self.tune, lr=self.base.lr if far else self.tune.lr, amp=args.amp)
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    def fresh(self) -> nn.Module:
        """Builds the network that every run of this seed starts from."""
        torch.manual_seed(self.args.seed)
        data = self.data
        net = build(self.args.model, in_channels=data.channels, num_classes=data.classes, image_size=data.image_size)
        return net.to(data.train_x.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def train(
        self, name: str, net: nn.Module, config: TrainConfig, algorithm: gs_algos.Algorithm | None = None
    ) -> Tensor:
        """Trains the network; returns its logits over the test set."""
        path = self.args.state / f"{self.stem}-{name}.safetensors"
        if algorithm is None:
            seconds = train(net, self.data, config, state=path, resume=True)
        else:
            seconds = train_compressed(net, self.data, config, algorithm, path, path.is_file())
        self.seconds[name] = round(seconds, 1)
        logits = predict(net, self.data)
        print(f"{name}: {accuracy(logits, self.data):.2f} % ({self.seconds[name]:.0f} s of training)", flush=True)
        return logits

    def calibrated(self, name: str, net: nn.Module, algo: Any) -> Tensor:
        """Lets an algorithm that does not train see images; returns the logits over the test set then."""
        if self.args.epochs:
            raise ValueError(f"--epochs must be 0 for {name}, which does not train, got {self.args.epochs}")
        started = time.perf_counter()
        algo.calibrate(net, self.data.normalize(self.data.train_x[:CALIBRATED]).split(CALIBRATED // 16))
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return predict(net, self.data)

    def compress(
        self, net: nn.Module, sizes: dict[str, Any] | None = None, longer: nn.Module | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Compresses the float network by the setting; returns it, and the logits before its last conversion.

        longer: the float network trained on, which some settings have as teacher.
        """
        args, data = self.args, self.data
        trained = torch.empty(0)
        for name in settings_up_to(args.setting):
            setting = SETTINGS[name]
            config = replace(self.compressed, lr=self.base.lr if setting.far else self.tune.lr)
            algo = make(setting, args.epochs, batches_per_epoch(data, args.batch_size), longer)
            net = algo.apply(net, data.example())
            amp = "-amp" if args.amp else ""
            if algo.trains:
                trained = self.train(f"float{args.float_epochs}-{name}-{args.epochs}{amp}", net, config, algo)
            else:
                trained = self.calibrated(name, net, algo)
            _draw(algo, self.stem, args)
            net = algo.convert(net, data.example())
            if sizes is not None:
                sizes[name] = size(net, data)
        return net, trained


def measure(args: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """Runs or resumes every stage; returns the row to record."""
    stages = Stages(args, data)
    net = stages.fresh()
    float_logits = stages.train(f"float{args.float_epochs}", net, stages.base)
    longer = copy.deepcopy(net)
    more_logits = stages.train(f"float{args.float_epochs}+{args.epochs}", longer, stages.tune)
    sizes = {"float": size(net, data)}
    net, trained = stages.compress(net, sizes, longer)
    converted = predict(net, data)
    reloaded, nbytes = _reload(net, stages.fresh, data)
    setting = SETTINGS[args.setting]
    row = {
        **{key: getattr(args, key) for key in ("model", "float_epochs", "epochs", "seed", "batch_size")},
        "recipe": args.setting + ("" if args.epochs else ", calibrated only"),
        "data": data.name,
        "train_images": len(data.train_x),
        "algorithm": setting.algorithm,
        "options": setting.options,
        "distill": setting.distill,
        "training": {
            "float": stages.base.__dict__,
            "tune": stages.tune.__dict__,
            "compressed": stages.compressed.__dict__,
        },
        "accuracy": {
            "float": accuracy(float_logits, data),
            "float_continued": accuracy(more_logits, data),
            "trained": accuracy(trained, data),
            "converted": accuracy(converted, data),
            "reloaded": accuracy(reloaded, data),
        },
        "parity": parity(trained, converted),
        "reload_exact": bool(torch.equal(converted, reloaded)),
        "nbytes": nbytes,
        "sizes": sizes,
        "training_seconds": stages.seconds,
        "wall_seconds": round(time.perf_counter() - stages.started, 1),
    }
    accuracies = row["accuracy"]
    row["drop"] = {key: round(accuracies[key] - accuracies["converted"], 4) for key in ("float", "float_continued")}
    shown = ("accuracy", "drop", "parity", "reload_exact", "nbytes", "sizes")
    print("\n".join(f"{key}: {row[key]}" for key in shown))
    return row


def settings_up_to(name: str) -> list[str]:
    """Lists the settings that run one after the other to come to this one."""
    before = SETTINGS[name].after
    return [*([] if before is None else settings_up_to(before)), name]


def size(net: nn.Module, data: ImageData) -> dict[str, Any]:
    """Measures the numbers held and their bytes, the multiply-adds of an image, and by batch the ms of a forward and
    the bytes that it takes beside them.
    """
    x = data.normalize(data.test_x[:1])
    batches = {str(batch): x.repeat(batch, 1, 1, 1) for batch in (1, 64)}
    with evaluating(net):
        peaks = {batch: peak_bytes(images.device, partial(net, images)) for batch, images in batches.items()}
    return {
        "numbers": sum(t.numel() for t in net.state_dict().values()),
        "nbytes": nbytes_of(net),
        "macs": count_operations(net, x, "bench.accuracy").macs,
        "ms": {batch: round(forward_ms(net, images).p50, 3) for batch, images in batches.items()},
        "peak_bytes": peaks,
    }


def make(setting: Setting, epochs: int, steps_per_epoch: int, longer: nn.Module | None = None) -> gs_algos.Algorithm:
    """Makes the algorithm for a training of this length."""
    cls: Any = algorithm_class(setting.algorithm)
    algorithm: gs_algos.Algorithm = cls(**setting.options, **cls.training_options(epochs, steps_per_epoch))
    if setting.distill is None:
        return algorithm
    if setting.longer and longer is None:
        raise ValueError("--setting: its teacher is the float network trained on, which only bench.accuracy makes")
    return gs_algos.Distill(algorithm, longer if setting.longer else None, **setting.distill)


def calibrate(algo: Any, net: nn.Module, data: ImageData) -> None:
    """Lets the algorithm measure what it needs before training on the first images, as ranges of activations."""
    algo.calibrate(net, data.normalize(data.train_x[:CALIBRATED]).split(CALIBRATED // 4))


def _draw(algo: Any, stem: str, args: argparse.Namespace) -> None:
    """Leaves a picture of the training beside the row, from an algorithm that draws one, if matplotlib is there."""
    if not hasattr(algo, "picture"):
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: needs matplotlib; pip install 'golden-stick-triton[report]'")
        return
    path = record.default_path(args.device).parent / "pictures" / f"{stem}-{args.setting}-{args.epochs}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    algo.picture(path)
    print(f"drawn in {path}")


def parity(trained: Tensor, converted: Tensor) -> dict[str, float]:
    """Measures how far the converted logits are from the trained ones, over the whole test set."""
    difference = (trained - converted).abs()
    return {
        "images": len(trained),
        "differing_predictions": int((trained.argmax(1) != converted.argmax(1)).sum()),
        "exact_images": int((difference.amax(1) == 0).sum()),
        "max_abs": difference.max().item(),
        "rms_relative": (difference.square().mean() / trained.square().mean()).sqrt().item(),
    }


def _reload(net: nn.Module, fresh: Any, data: ImageData) -> tuple[Tensor, dict[str, int]]:
    """Returns the logits of the saved and loaded network, and the bytes of float weights and of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        gs_algos.save(net, folder)
        logits = predict(gs_algos.load(folder, fresh), data)
        on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    float_bytes = sum(t.numel() * t.element_size() for t in fresh().state_dict().values())
    return logits, {"float": float_bytes, "checkpoint": on_disk}


if __name__ == "__main__":
    raise SystemExit(main())
