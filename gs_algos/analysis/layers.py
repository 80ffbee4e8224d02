"""Says what layers with a weight, adds and concats are in a compressed network, and what they were in the float one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.algorithm import history
from gs_algos.core.modules import get_module, parent_name
from gs_algos.core.plan import PlanRow, rows_of
from gs_algos.core.registry import restorer
from gs_algos.quant.fake_quant.integer_inference import IntegerEval
from gs_algos.quant.integer.layers import QuantizedLayer
from gs_algos.quant.integer.static_quantizer import StaticQuantizer
from gs_algos.quant.network.layer_plan import LayerPlan, join_rows, layer_rows
from gs_algos.quant.packed.conv_base import Convolution, channels_fastest
from gs_algos.quant.packed.float_grid import NAMES
from gs_algos.quant.packed.module import Packed
from gs_algos.quant.packed.packable import base_of, matrix_of
from gs_kernels import unpack_codes

SHOWN = 5  # names that a sentence lists
SAMPLED = 2**20  # weights of a layer that its picture counts, at most


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """Describes one layer of a compressed network beside the float layer of its name.

    Args:
        after: the layer.
        before: the float one; None if there is none.
        float_site: its name: of the module that calls the function which is the layer `site` in the compressed network.
        activation: what the layer computes beyond the modules that it took the place of, because the float network does
            so outside of modules; "" for nothing.
        place: the module of the compressed network whose output is compared.
        weight, act: schemes; the dtype of a float weight, and "" for float inputs.
    """

    site: str
    after: nn.Module
    before: nn.Module | None
    float_site: str
    activation: str
    place: nn.Module
    weight: str
    act: str

    @property
    def kind(self) -> str:
        return type(self.after).__name__

    @property
    def comparable(self) -> bool:
        """Says whether both layers have weights of one shape."""
        return self.before is not None and _shape(self.before) == _shape(self.after)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with the float network's inputs, up to what is compared."""
        if self.place is self.after:
            return self.after(*args, **kwargs)
        if any(module is self.after for module in self.place.modules()):
            return self.place(*args, **kwargs)
        return self.place(self.after(*args, **kwargs))

    @property
    def nbytes(self) -> int:
        return _nbytes(self.after)

    @property
    def float_nbytes(self) -> int:
        return 0 if self.before is None else _nbytes(self.before)

    @property
    def numbers(self) -> int:
        """Counts the weights."""
        n, k = _shape(self.after)
        return n * k

    @property
    def bits(self) -> float:
        """Returns the bits that a weight takes, with its share of scales and zero points; 0 if another layer has it."""
        if isinstance(self.after, Packed):
            return 8 * self.after.nbytes / max(1, self.numbers)
        return 8.0 * _float_weight(self.after).element_size()

    @cached_property
    def _grid(self) -> StaticQuantizer | None:
        quantizer = getattr(self.after, "input_quantizer", None)
        return quantizer if isinstance(quantizer, StaticQuantizer) else None

    @cached_property
    def input_range(self) -> tuple[float, float] | None:
        """Returns the smallest and largest value that inputs are clipped to; None without a fixed grid."""
        return None if self._grid is None else range_of(self._grid)

    @property
    def input_step(self) -> float:
        return 0.0 if self._grid is None else abs(float(self._grid.scale))

    @cached_property
    def _codes(self) -> Tensor | None:
        if not isinstance(self.after, Packed):
            return None
        weight = self.after.packed
        return unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)

    @property
    def levels(self) -> int:
        """Counts the levels that a weight can have; 0 of a float one."""
        if not isinstance(self.after, Packed):
            return 0
        scheme = getattr(self.after, "scheme", None)
        bits = int(getattr(scheme, "bits", 0) or _bits_of(self.weight) or self.after.bits)
        return int(2**bits)

    @property
    def levels_used(self) -> int:
        return 0 if self._codes is None else int(self._codes.unique().numel())

    @property
    def share_zero(self) -> float | None:
        """Returns the share of weights that are 0."""
        if isinstance(self.after, Packed):
            if self.after.packed.levels is not None:
                return None
            zero = self.after.packed.zero
            assert self._codes is not None
            codes = self._codes.float()
            zeros = _each(self.after, zero) if isinstance(zero, Tensor) else zero
            return float((codes == zeros).float().mean())
        weight = _float_weight(self.after)
        return float((weight == 0).float().mean())

    def weight_picture(self, norms: Iterable[nn.Module] = ()) -> tuple[Tensor | None, tuple[float, ...]]:
        """Returns the float weight in steps of the compressed weight's scales, and the levels; as it is without scales.

        norms: batch norms of the float network that the compressed weight holds.
        """
        if self.before is None:
            return None, ()
        weight = _float_weight(self.before).detach().float()
        if not self.comparable or not isinstance(self.after, Packed):
            return _sampled(weight), ()
        rows = _in_packed_order(self.after, matrix_of(self.before, weight))
        for norm in norms:
            rows = rows * _slope(norm)[:, None]
        held = self.after.packed
        scale = _each(self.after, held.scale).float()
        steps = rows / torch.where(scale == 0, 1.0, scale)
        if held.levels is not None:
            return _sampled(steps), tuple(held.levels.float().tolist())
        low = 0.0
        if isinstance(held.zero, Tensor):
            steps = steps + _each(self.after, held.zero).float()
        else:
            low = -float(held.zero)
        used = self._codes
        assert used is not None
        first, last = int(used.min()), int(used.max())
        return _sampled(steps), tuple(low + code for code in range(first, last + 1))


def layer_facts(before: nn.Module, after: nn.Module) -> list[LayerFacts]:
    """Describes every layer with a weight of a compressed network, in the order of registration."""
    schemes, plans = _schemes(after), _plans(after)
    modules, float_modules = dict(after.named_modules()), dict(before.named_modules())
    found = []
    for site, module in modules.items():
        if not is_layer(module):
            continue
        plan, activation, place, float_site = plans.get(site), "", module, site
        if site not in float_modules and (inside := parent_name(site)) in float_modules:
            float_site, place = inside, modules[inside]
        old = float_modules.get(float_site)
        old = old if old is not None and is_layer(old) else None
        if plan is not None and isinstance(module, QuantizedLayer):
            if plan.bn is not None and plan.norm_children:
                place = get_module(after, plan.bn)
            elif plan.fused_activation is not None and plan.fused_activation not in float_modules:
                activation = str(plan.epilogue.op)
        scheme, act = schemes.get(site, ("", ""))
        found.append(
            LayerFacts(
                site,
                module,
                old,
                float_site,
                activation,
                place,
                scheme or _weight_text(module),
                act or _act_text(module),
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class JoinFacts:
    """Describes an add or a concat whose operands a converted network rounds to one scale.

    Args:
        site: as the plan calls it.
        layer: in front of it, which rules name.
        places: modules of the float network that give the operands.
        grid: what rounds them.
    """

    site: str
    layer: str
    places: tuple[str, ...]
    grid: StaticQuantizer


def join_facts(before: nn.Module, after: nn.Module) -> list[JoinFacts]:
    """Describes every add and concat with one scale of a converted network, in the order of its plan."""
    modules, float_modules = dict(after.named_modules()), dict(before.named_modules())
    found = []
    for entry, rows in _converted(after):
        # whatever computes an operand may have been taken over by a layer, which then rounds it
        layers = {row.site: row.site for row in layer_rows(rows)}
        for row in layer_rows(rows):
            layers |= dict.fromkeys(filter(None, (row.settings.bn, row.settings.fused_activation)), row.site)
        norms = {site: norm for site, norm, _ in entry.get("folded", ())}
        for join in join_rows(rows):
            operands = join.settings.operands
            places = tuple(norms.get(name, name) for name in operands)
            holders = [modules.get(name) for operand in operands for name in (operand, layers.get(operand, ""))]
            grids = [getattr(module, "output_quantizer", None) for module in holders]
            grid = next((grid for grid in grids if isinstance(grid, StaticQuantizer)), None)
            layer = next((layers[name] for name in operands if name in layers), None)
            if grid is not None and layer is not None and all(place in float_modules for place in places):
                found.append(JoinFacts(join.site, layer, places, grid))
    return found


def taken_over(before: nn.Module, after: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of the float network, by name, that are Identity in the compressed one.

    Layers have taken over what these do: batch norms that were folded, activations that run in the layer's own call.
    """
    modules = dict(after.named_modules())
    return {
        name: module
        for name, module in before.named_modules()
        if type(modules.get(name)) is nn.Identity and type(module) is not nn.Identity
    }


def stacked_note(network: nn.Module) -> str:
    """Says which parameters stack several weights, as Transformers does with experts: they are no layers; "" if none.

    Such a parameter has three axes, and its module is none of PyTorch's.
    """
    stacked = {
        f"{site}.{name}": weight.numel()
        for site, module in network.named_modules()
        if not is_layer(module) and not type(module).__module__.startswith("torch.nn.")
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and len(weight) > 1
    }
    if not stacked:
        return ""
    held = f"{len(stacked)} parameters of several weights each, such as experts, stay float"
    return f"{held} ({sum(stacked.values()):,} weights): {some_of(stacked)}"


def some_of(names: Iterable[str]) -> str:
    """Lists the first of some layers, for a sentence."""
    found = list(names)
    return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "") if found else "none"


def is_layer(module: nn.Module) -> bool:
    """Says whether a module holds a weight that is multiplied or looked up."""
    held = base_of(module) is not None and isinstance(module._parameters.get("weight"), Tensor)
    return held or isinstance(module, Packed | IntegerEval)


def range_of(grid: StaticQuantizer) -> tuple[float, float]:
    """Returns the smallest and largest value of a grid."""
    ends = ((torch.tensor([grid.scheme.qmin, grid.scheme.qmax]) - grid.zero.cpu()) * grid.scale.cpu()).tolist()
    return min(ends), max(ends)


def _weight_text(module: nn.Module) -> str:
    if isinstance(module, IntegerEval):
        return str(module.weight_scheme())
    if isinstance(module, QuantizedLayer):
        return str(module.scheme)
    if isinstance(module, Packed):
        whole = module.group_size == module.shape[1]
        name = NAMES.get(str(module.packed.scale.dtype).removeprefix("torch."), "")
        if name:
            return name
        return f"int{module.bits}@channel" if whole else f"int{module.bits}@group:{module.group_size}"
    return str(_float_weight(module).dtype).removeprefix("torch.")


def _act_text(module: nn.Module) -> str:
    quantizer = getattr(module, "input_quantizer", None)
    return str(getattr(module, "act", "")) if quantizer is None else str(quantizer.scheme)


def _bits_of(scheme: str) -> int:
    """Reads the bits of a scheme's text: `int3@group:64`, `2bit@channel`; 0 for a dtype."""
    head = scheme.partition("@")[0].removeprefix("u").removeprefix("int").removesuffix("bit")
    return int(head) if (head.isdigit() and "@" in scheme) or scheme.endswith("bit") else 0


def _schemes(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Reads the schemes of weights and activations from the plans in a model's history; the newest counts."""
    found: dict[str, tuple[str, str]] = {}
    for entry in history(model):
        for row in entry["plan"]:
            settings: Mapping[str, Any] = row["settings"] or {}
            if row["action"] != "keep" and settings.get("weight"):
                for name in (row["site"], *settings.get("names", ())):
                    found[name] = (str(settings["weight"]), str(settings.get("act") or ""))
    return found


def _plans(model: nn.Module) -> dict[str, LayerPlan]:
    """Returns the plans of converted layers, which say what their calls compute."""
    return {row.site: row.settings for _, rows in _converted(model) for row in layer_rows(rows)}


def _converted(model: nn.Module) -> Iterator[tuple[Mapping[str, Any], list[PlanRow]]]:
    """Yields the entries of a model's history that were converted, with the rows of their plans."""
    for entry in history(model):
        if entry["stage"] == "converted":
            yield entry, rows_of(entry["plan"], restorer(entry["algorithm"]).row_settings)


def _float_weight(module: Any) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Packed):
        return module.shape
    n, k = matrix_of(module, _float_weight(module)).shape
    return n, k


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _each(layer: Packed, per_group: Tensor) -> Tensor:
    """Repeats a tensor `[N, G]` for each of the weights `[N, K]`."""
    return per_group.repeat_interleave(layer.group_size, 1) if per_group.shape[1] > 1 else per_group


def _in_packed_order(layer: Packed, rows: Tensor) -> Tensor:
    """Reorders float rows `[N, K]` to the order of the layer's codes."""
    if isinstance(layer, Convolution) and channels_fastest(layer.group_size, layer.filter):
        return rows.view(len(rows), layer.filter[0], -1).transpose(1, 2).flatten(1)
    return rows


def _slope(norm: Any) -> Tensor:
    """Returns what a batch norm multiplies channels with, `[C]` fp32."""
    slope = (norm.running_var.float() + norm.eps).rsqrt()
    return slope if norm.weight is None else slope * norm.weight.detach().float()


def _sampled(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return flat if flat.numel() <= SAMPLED else flat[:: -(-flat.numel() // SAMPLED)]
