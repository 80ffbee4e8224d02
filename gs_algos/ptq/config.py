"""Defines the options of PTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from gs_algos.core.config import AlgorithmConfig
from gs_algos.core.layer_rules import Rule
from gs_algos.ptq.kv import KVScheme
from gs_algos.ptq.rounding import NAMES, TUNED
from gs_algos.ptq.solve import check_options
from gs_algos.ptq.transforms import chosen_transforms
from gs_algos.quant.packed.linear import TOKEN
from gs_algos.quant.packed.round_to_nearest import packable
from gs_algos.quant.scheme import Scheme, as_text, check_rules, join_scheme, of_integers

OBSERVED, GRADIENT = RANGES = "observed", "gradient"
WIDTHS = (1, 2, 3, 4, 8)  # bits of weights; 3 are stored in 4


@dataclass(frozen=True)
class PTQConfig(AlgorithmConfig):
    """Options of PTQ.

    Args:
        weight: scheme of the weights, with 1, 2, 3, 4 or 8 bits: `int4@group:64`, `int8@channel`,
            `int4@group:128:asym:mse`; 3 are stored in 4. With static activations 2 to 8 bits. Or 4-bit floats, `mxfp4`
            and `nvfp4`, by `nearest` or `gptq`.
        act: None leaves activations float; `int8@token` rounds each row a linear reads to 8 bits with a scale of its
            own, as it runs. A scheme such as `int8@tensor:mse` is static, one scale for a tensor, found in calibration:
            batch norms are folded, and layers and adds become those of SimQAT, which multiply integers.
        ranges: of static activations: `observed` by the observer of their scheme; `gradient` (arXiv:2111.12293) then
            searches those of what linears and convolutions without groups read, by their errors times the gradient of
            the network's outputs, and takes them if the outputs of held-out batches come closer.
        kv: None leaves the cache of a language model float; `int8@token`, `int4@token`, `int4@kivi:32` and
            `int2@kivi:32` quantize its keys and values as they are written, see `gs_algos.ptq.kv`, without data.
        transforms: `equalize` (arXiv:1906.04721) makes the ranges of channels equal in layers that follow one another.
            `rotate` (arXiv:2404.00456) mixes channels by Hadamard matrices, which spreads outliers.
            `smooth` (arXiv:2211.10438), `smooth=0.85` for an alpha of your own, and `awq` (arXiv:2306.00978) scale
            what layers read, and the norm or linear before them takes the scale back. `relayernorm` (arXiv:2212.08254)
            gives all channels behind a norm one range. They run in this order.
        embeddings: scheme of every `nn.Embedding`, rounded to nearest; None leaves them float.
        rounding: `nearest`; `gptq` (arXiv:2210.17323), which moves the error of each column into those that follow.
            `signround` (arXiv:2309.05516) and `adaround` (arXiv:2004.10568) then tune all layers of a block together by
            gradient, on what the block returns; layers outside the blocks keep the codes of gptq.
        correct: 0 to 1, how much of what the layers before have done wrong a weight makes good; 0 for none.
        refine: rounds of scale refit and coordinate descent behind the rounding.
        order: of the columns of gptq: `act` by the size of their inputs, `group` so within groups, `none` as they are.
        damp: added to the diagonal of the statistics, as a share of its mean; None for max(0.01, K / 4T) of K inputs
            and T tokens.
        bias: True moves each bias by the difference of the mean outputs.
        steps: of `signround` and `adaround`; None for 200 and 2,000.
        lr: of them, learning rate; None for 1 / steps, which falls to 0, and for 8 / steps.
        blocks: `auto` finds the blocks of the network, `none` takes it as one, `re:<expression>` names them.
        budget: bytes of activations in memory; what is more goes to files.
        rules: `(pattern, {"weight": ..., "act": ..., "rounding": ...} | None)`, see `gs_algos.core.layer_rules`; None
            leaves the layer float. With a static `act` also "join", as in `SimQATConfig`.
    """

    weight: str | Scheme = "int4@group:128"
    act: str | Scheme | None = None
    ranges: str = OBSERVED
    kv: str | None = None
    transforms: tuple[str, ...] = ()
    embeddings: str | Scheme | None = None
    rounding: str = "gptq"
    correct: float = 0.5
    refine: int = 2
    order: str = "act"
    damp: float | None = None
    bias: bool = True
    steps: int | None = None
    lr: float | None = None
    blocks: str = "auto"
    budget: int = 2**32
    rules: tuple[Rule, ...] = ()

    who: ClassVar[str] = "PTQ"

    def __post_init__(self) -> None:
        checked_act(self.act)
        check_rules(self.rules, "PTQ", {"act": checked_act, "join": join_scheme})
        checked_weight = static_weight if self.static else rounded_weight
        checked_weight(self.weight)
        if self.embeddings is not None:
            rounded_weight(self.embeddings)
        for name in ("weight", "act", "embeddings"):
            if isinstance(getattr(self, name), Scheme):
                object.__setattr__(self, name, str(getattr(self, name)))
        chosen_transforms(self.transforms)
        object.__setattr__(self, "transforms", tuple(self.transforms))
        check_options(self, "PTQ", NAMES)
        check_rules(self.rules, "PTQ", {"weight": checked_weight, "rounding": checked_rounding})
        object.__setattr__(self, "rules", as_text(self.rules))
        if self.static and TOKEN in self._acts():
            raise ValueError(f"PTQ: act must be {TOKEN!r} or static in all layers, got both; leave some float")
        if self.static and self.embeddings is not None:
            raise ValueError(
                f"PTQ: embeddings stay float beside static activations, got embeddings={self.embeddings!r}; use "
                f"embeddings=None, or act={TOKEN!r}"
            )
        if self.static and "rotate" in self.transforms:
            raise ValueError(f"PTQ: rotate needs activations that are float or {TOKEN!r}, got act={str(self.act)!r}")
        _refuse_unless(self.ranges in RANGES, "ranges", " or ".join(RANGES), self.ranges)
        if self.ranges == GRADIENT and not self.static:
            raise ValueError(
                f"PTQ: ranges are of static activations, got ranges={self.ranges!r} and act={self.act!r}; use act "
                "such as 'int8@tensor'"
            )
        if self.kv is not None:
            object.__setattr__(self, "kv", str(KVScheme.parse(self.kv)))
            if self.static:
                raise ValueError(
                    f"PTQ: kv goes with activations that are float or {TOKEN!r}, got act={str(self.act)!r}; use kv=None"
                )
        _refuse_unless(type(self.budget) is int and self.budget >= 0, "budget", "bytes >= 0", self.budget)
        blocks_fit = isinstance(self.blocks, str) and (self.blocks in ("auto", "none") or self.blocks.startswith("re:"))
        _refuse_unless(blocks_fit, "blocks", "auto, none or re:<expression>", self.blocks)
        _refuse_unless(isinstance(self.bias, bool), "bias", "True or False", self.bias)
        steps_fit = self.steps is None or (type(self.steps) is int and self.steps > 0)
        _refuse_unless(steps_fit, "steps", "a whole number above 0, or None", self.steps)
        lr_fits = self.lr is None or (type(self.lr) in (int, float) and 0 < self.lr < float("inf"))
        _refuse_unless(lr_fits, "lr", "above 0, or None", self.lr)
        for name, value in (("steps", self.steps), ("lr", self.lr)):
            if value is not None and not self.tuned:
                tuned = " or ".join(TUNED)
                raise ValueError(f"PTQ: {name} is for {tuned}, got {name}={value!r} and rounding={self.rounding!r}")

    @property
    def static(self) -> bool:
        """Says whether activations have scales that calibration finds."""
        return any(act not in (None, TOKEN) for act in self._acts())

    @property
    def tuned(self) -> bool:
        """Says whether codes of some layer are tuned by gradient."""
        return any(rounding in TUNED for rounding in (self.rounding, *self._ruled("rounding")))

    def _acts(self) -> list[object]:
        """Returns the schemes of activations, that of all layers and those of rules."""
        return [self.act, *self._ruled("act")]

    def _ruled(self, option: str) -> list[object]:
        """Returns what the rules set an option to; None for a rule that does not."""
        rules = self.rules if isinstance(self.rules, tuple | list) else ()
        pairs = [rule for rule in rules if isinstance(rule, tuple | list) and len(rule) == 2]
        return [rule[1].get(option) for rule in pairs if isinstance(rule[1], Mapping)]


def _refuse_unless(right: bool, option: str, must: str, got: object) -> None:
    if not right:
        raise ValueError(f"PTQ: {option} must be {must}, got {got!r}")


def checked_act(act: Any) -> None:
    """Raises ValueError unless it is a scheme of activations."""
    if act in (None, TOKEN):
        return
    if not isinstance(act, str | Scheme) or "@token" in str(act):
        raise ValueError(f"PTQ: act must be None or {TOKEN!r}, or static such as 'int8@tensor', got {act!r}")
    if Scheme.parse(act, "act").learned:
        raise ValueError(f"PTQ: lsq needs training, got act={str(act)!r}; use minmax, percentile or mse, or SimQAT")


def rounded_weight(weight: str | Scheme) -> Scheme:
    """Parses the scheme of weights whose layers read floats, or rows that are rounded as they run.

    Raises:
        ValueError: if its bits are none of `WIDTHS`, or it is learned.
    """
    return packable(weight, WIDTHS, "PTQ")


def static_weight(weight: str | Scheme) -> Scheme:
    """Parses the scheme of weights beside static activations.

    Raises:
        ValueError: if it has 1 bit, or is learned.
    """
    scheme = of_integers(weight, "PTQ")
    if scheme.bits == 1:
        raise ValueError(f"PTQ: weights must have 2 to 8 bits beside static activations, got {scheme}")
    if scheme.learned:
        raise ValueError(f"PTQ: lsq needs training, got weight={str(weight)!r}; use minmax or mse, or SimQAT")
    return scheme


def checked_rounding(rounding: object) -> str:
    """Returns the name of a rounding, checked."""
    if rounding not in NAMES:
        raise ValueError(f"PTQ: rounding must be one of {', '.join(NAMES)}, got {rounding!r}")
    return str(rounding)


class PTQOptions(TypedDict, total=False):
    """Types the fields of `PTQConfig` as keywords of `PTQ`, for type checkers."""

    weight: str | Scheme
    act: str | Scheme | None
    ranges: str
    kv: str | None
    transforms: Sequence[str]
    embeddings: str | Scheme | None
    rounding: str
    correct: float
    refine: int
    order: str
    damp: float | None
    bias: bool
    steps: int | None
    lr: float | None
    blocks: str
    budget: int
    rules: Sequence[Rule]
