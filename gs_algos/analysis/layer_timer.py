"""Times layers alone, in each packed form, and keeps what was measured in a file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.layer_forms import FLOAT, WHO, in_form, parse
from gs_algos.core.algorithm import Inputs, run
from gs_algos.core.batches import tensor_in
from gs_algos.core.files import write_atomically
from gs_algos.core.machine import PACKAGE, package_version
from gs_algos.core.modules import get_module, parameter_owners
from gs_algos.core.timing import Timing, time_in_turns
from gs_algos.quant.packed.conv_base import geometry_of
from gs_algos.quant.packed.module import Packed
from gs_algos.quant.packed.packable import CONVS, base_of

FORMAT, VERSION = "golden-stick latency table", 1


@dataclass(frozen=True)
class Call:
    """Describes the input of one call of a layer, and how many elements come out."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    outputs: int

    def input(self) -> Tensor:
        """Makes random values in the same strides."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.copy_(torch.randn(self.shape, generator=torch.Generator().manual_seed(0)))


def calls_of(net: nn.Module, inputs: Inputs) -> dict[str, list[Call]]:
    """Returns the calls of each linear and convolution in a forward, in the order they run."""
    found: dict[str, list[Call]] = defaultdict(list)

    def watch(name: str) -> Any:
        def after(layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            x = tensor_in((args, kwargs))
            found[name].append(Call(tuple(x.shape), x.stride(), x.dtype, x.device, y.numel()))

        return after

    packed = next((name for name, module in net.named_modules() if isinstance(module, Packed)), None)
    if packed is not None:
        raise ValueError(f"{WHO}: the network must be float, got a packed layer at {packed}; use layer_times")
    with ExitStack() as stack:
        for name, layer in net.named_modules():
            if base_of(layer) not in (None, nn.Embedding):
                stack.callback(layer.register_forward_hook(watch(name), with_kwargs=True).remove)
        run(net, inputs, WHO)
    owners = parameter_owners(net)
    alone = {n: calls for n, calls in found.items() if len(owners.get(id(get_module(net, n).weight), ())) < 2}
    if not alone:
        raise ValueError(
            f"{WHO}: the network must run a linear or a convolution with a weight of its own, got "
            f"{type(net).__name__} without"
        )
    return alone


class LayerTimer:
    """Times layers in each form.

    layers: name -> choice -> ms; missing: name -> choice -> why not.
    """

    def __init__(self, store: TimeStore, facts: Mapping[str, Any], choices: Mapping[str, None], seconds: float) -> None:
        self.store, self.choices, self.seconds = store, tuple(choices), seconds
        keys = ("device", "device_name", "instructions", "threads", "torch", "triton")
        self.facts = {**{key: facts[key] for key in keys}, "golden_stick": package_version(PACKAGE)}
        self.layers: dict[str, dict[str, float]] = {}
        self.missing: dict[str, dict[str, str]] = {}

    def add(self, name: str, layer: nn.Module, calls: Sequence[Call]) -> None:
        """Adds a layer; what is neither in the store is timed, its forms in turns."""
        sums: dict[str, float] = dict.fromkeys(self.choices, 0.0)
        self.missing[name] = {}
        for call in calls:
            keys = {choice: self._key(layer, call, choice) for choice in sums if choice not in self.missing[name]}
            self._measure(name, layer, call, {c: key for c, key in keys.items() if self.store.ms(key) is None})
            for choice, key in keys.items():
                sums[choice] += self.store.ms(key) or 0.0
        self.layers[name] = {choice: ms for choice, ms in sums.items() if choice not in self.missing[name]}

    def _measure(self, name: str, layer: nn.Module, call: Call, keys: Mapping[str, str]) -> None:
        x = call.input()
        forms: dict[str, nn.Module] = {}
        for choice in keys:
            try:
                forms[choice] = in_form(layer, x, choice)
            except (ValueError, RuntimeError) as error:
                self.missing[name][choice] = str(error).splitlines()[0]
        timings = time_in_turns([partial(form, x) for form in forms.values()], call.device, self.seconds)
        self.store.add({keys[choice]: timing for choice, timing in zip(forms, timings, strict=True)})

    def _key(self, layer: Any, call: Call, choice: str) -> str:
        """Returns what the time depends on, as JSON."""
        dense = sorted(range(len(call.shape)), key=lambda axis: -call.stride[axis])
        geometry = geometry_of(layer) if isinstance(layer, CONVS) else {}
        weight, act = (FLOAT, None) if choice == FLOAT else parse(choice)
        return json.dumps(
            {
                **self.facts,
                "op": str(getattr(base_of(layer), "__name__", "")),
                "kind": type(layer).__name__,
                "x": call.shape,
                "outputs": call.outputs,
                "order": dense,
                "dtype": str(call.dtype).removeprefix("torch."),
                "weight": tuple(layer.weight.shape),
                "bias": getattr(layer, "bias", None) is not None,
                **geometry,
                "scheme": str(weight),
                "act": act,
            },
            sort_keys=True,
        )


class TimeStore:
    """Keeps times by what they depend on, in a file if there is a path."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.timings: dict[str, Timing] = {} if path is None or not path.exists() else _read(path)

    def ms(self, key: str) -> float | None:
        found = self.timings.get(key)
        return None if found is None else found.p50

    def add(self, timings: Mapping[str, Timing]) -> None:
        """Adds times, and writes the file; what others have written meanwhile stays."""
        if not timings:
            return
        others = _read(self.path) if self.path is not None and self.path.exists() else {}
        self.timings = {**others, **self.timings, **timings}
        if self.path is not None:
            rows = [{**json.loads(key), "ms": vars(timing)} for key, timing in self.timings.items()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": FORMAT, "version": VERSION, "rows": rows}, indent=1)
            write_atomically(self.path, text.encode())


def _read(path: Path) -> dict[str, Timing]:
    must = f"{WHO}: {path} must be a {FORMAT}, version {VERSION}"
    try:
        data = json.loads(path.read_text())
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{must}, got {data['format']!r}, version {data['version']}; choose another file")
        rows = [({key: value for key, value in row.items() if key != "ms"}, row["ms"]) for row in data["rows"]]
        return {json.dumps(key, sort_keys=True): Timing(**ms) for key, ms in rows}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{must}, got {type(error).__name__}: {error}; choose another file") from error
