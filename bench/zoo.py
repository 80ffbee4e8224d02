"""`python -m bench.zoo`: takes one network of each installed family through plan, apply, a training step and convert.

Families: torchvision's classifiers, timm's files, and the tiny Transformers of tests/nets/transformers_models.py, with
random weights. A row says how many layers were quantized and why the others were not, how far the converted network is
from the trained one, or which stage failed. torchvision's C++ operators (boxes, not layers) are not needed: where its
wheel does not fit the installed torch, empty declarations stand for them.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bench import record
from gs_algos import SimQAT
from gs_algos.core.plan import Plan
from gs_algos.fx.op_names import SITES
from tests.nets.transformers_models import ARCHITECTURES, tiny

# words in the names of small networks, smallest first
SMALL = [
    "atto",
    "femto",
    "pico",
    "nano",
    "xxt",
    "xxs",
    "xx_small",
    "xs",
    "x_small",
    "t0",
    "b0",
    "m0",
    "tiny",
    "mini",
    "small",
    "lite",
    "_s",
    "0_5",
    "18",
    "26",
    "50",
]
COLUMNS = "{:13} {:36} {:8} {:>12} {:>6} {:>9} {:>9} {:>6}  {}"


@dataclass(frozen=True)
class Entry:
    """Describes a network that can be built. build: makes the network and the inputs of one forward pass."""

    library: str
    family: str
    name: str
    build: Callable[[], tuple[nn.Module, Any]]


def torchvision_entries() -> Iterator[Entry]:
    _declare_operators()
    from torchvision import models

    names: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        names.setdefault(re.match(r"[a-z]+(_v2)?", name)[0], []).append(name)  # type: ignore[index]
    for family, members in names.items():
        name = smallest(members)
        size = 299 if family == "inception" else 224
        yield Entry("torchvision", family, name, partial(_torchvision, name, size))


def timm_entries() -> Iterator[Entry]:
    _declare_operators()
    import timm

    for family in timm.list_modules():
        members = timm.list_models(module=family)
        if members:
            name = smallest(members)
            yield Entry("timm", family, name, partial(_timm, name))


def transformers_entries() -> Iterator[Entry]:
    _declare_operators()  # transformers imports torchvision where it is installed
    for name in ARCHITECTURES:
        yield Entry("transformers", name.removesuffix("Config"), name, partial(tiny, name))


LIBRARIES = {"torchvision": torchvision_entries, "timm": timm_entries, "transformers": transformers_entries}


def smallest(names: list[str]) -> str:
    """Picks the network whose name has the smallest size in it, as far as names tell."""
    return min(names, key=lambda name: (next((i for i, word in enumerate(SMALL) if word in name), 99), len(name), name))


def pixels(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _torchvision(name: str, size: int) -> tuple[nn.Module, Any]:
    from torchvision import models

    return models.get_model(name), pixels(3, size, size)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, num_classes=10)
    return model, pixels(*model.default_cfg["input_size"])


def _declare_operators() -> None:
    """Lets torchvision be imported without its compiled operators, which its Python files only look up by name."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT.append(library)
    for name in dict.fromkeys(re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"', source)):
        library.define(f"{name}() -> ()")


_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators away


def walk(entry: Entry, options: dict[str, Any]) -> dict[str, Any]:
    """Returns one row: what was quantized, or the stage that failed and how."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"library": entry.library, "family": entry.family, "model": entry.name, "stage": "build"}
    start = time.monotonic()
    try:
        model, inputs = entry.build()
        settle(model, inputs)
        row["stage"] = "plan"
        algo = SimQAT(**options)
        row |= facts(algo.plan(model, inputs), model)
        row["stage"] = "apply"
        model = algo.apply(model, inputs)
        row["stage"] = "step"
        train_once(model, inputs, algo)
        row["stage"] = "convert"
        algo.convert(model.eval())
        assert algo.parity is not None
        row |= {"stage": "done", "layer_error": algo.parity.layer_error, "output_error": algo.parity.output_error}
    except Exception as error:  # noqa: BLE001  whatever a network does is what this table is about
        lines = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0][:300]}"
    return {**row, "options": options, "seconds": round(time.monotonic() - start, 1)}


def facts(plan: Plan, model: nn.Module) -> dict[str, Any]:
    layers = [row for row in plan.rows if row.kind not in ("add", "cat")]
    acted = [row for row in layers if row.action != "keep"]
    joins = [row for row in plan.acted() if row.kind in ("add", "cat")]
    reasons = Counter(
        re.sub(r"'[^']*'|\b[\w]+(\.\w+)+\b|\d+", "*", row.reason) for row in layers if row.action == "keep"
    )
    return {
        "rung": plan.tracer,
        "layers": len(layers),
        "quantized": len(acted),
        "folded": sum(row.settings.bn is not None for row in acted),
        "joins": len(joins),
        "sites": sum(isinstance(module, SITES) for module in model.modules()),
        "kept": dict(reasons.most_common(4)),
        "notes": list(plan.notes)[:3],
    }


def settle(model: nn.Module, inputs: Any) -> None:
    """Gives batch norms the statistics of these inputs: with the ones they start from, deep networks give all zeros."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), inputs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def train_once(model: nn.Module, inputs: Any, algo: SimQAT) -> None:
    """Takes one optimizer step on the mean square of every output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    output = call(model.train(), inputs)
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    torch.stack([t.float().square().mean() for t in tensors]).sum().backward()
    optimizer.step()
    algo.step()


def line(row: dict[str, Any]) -> str:
    layers = f"{row['quantized']}/{row['layers']}" if "layers" in row else "-"
    errors = [f"{row[key]:.1e}" if key in row else "-" for key in ("layer_error", "output_error")]
    note = (
        f"{row['stage']}: {row['error']}" if "error" in row else "; ".join(f"{n}x {r}" for r, n in row["kept"].items())
    )
    network = (row["library"], row["model"][:36], row.get("rung", "-"), layers, row.get("folded", "-"))
    return COLUMNS.format(*network, *errors, f"{row['seconds']:.0f}", note[:160])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    parser.add_argument("--only", nargs="+", default=["*"], help="families by shell pattern, such as 'res*'")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/<date>-<commit>.jsonl")
    parser.add_argument("--weight", default="int8@channel")
    parser.add_argument("--act", default="int8@tensor:ema")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    print(COLUMNS.format("library", "model", "read by", "quantized", "folded", "layer", "output", "s", ""))
    failed = done = 0
    for library in args.library:
        if find_spec(library) is None:
            print(f"{library} is not installed")
            continue
        for entry in LIBRARIES[library]():
            if any(fnmatch.fnmatch(entry.family, pattern) for pattern in args.only):
                row = walk(entry, {"weight": args.weight, "act": args.act})
                record.append(row, kind="zoo", device="cpu", path=args.out)
                print(line(row), flush=True)
                failed, done = failed + ("error" in row), done + 1
    print(f"{done - failed} of {done} networks converted")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
