"""Describes the grid of a tensor, as data and as text: `int8@channel`, `int4@group:64:mse`, `uint8@tensor`, `mxfp4`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gs_kernels import FloatFormat, Granularity, IntFormat, PerChannel, PerGroup, PerTensor
from gs_kernels.formats import FLOAT_GROUPS

Role = Literal["weight", "act"]
OBSERVERS = {
    "weight": ("minmax", "percentile", "mse"),
    "act": ("ema", "minmax", "percentile", "mse"),
}
DEFAULT_ARGUMENT = {"ema": 0.01, "percentile": 99.99}
FLOAT_OBSERVERS = ("minmax", "mse")
GRAMMAR = "[u]int<1..8>@<tensor|channel|group:N>[:<ema|minmax|percentile|mse>[=<number>]][:lsq][:sym|:asym][:narrow]"


@dataclass(frozen=True)
class Scheme:
    """Describes a grid of integers, or of 4-bit floats for weights, and how its range is found.

    Args:
        format: the grid. 4-bit floats are symmetric, in groups of their own size, with `minmax` or `mse`.
        granularity: which elements share a scale; the channel axis of a weight is its output axis.
        symmetric: range [-a, a] (zero point 0 on a signed grid) instead of [min, max].
        observer: `minmax` running extremes (weights: of the current values) · `ema` moving average, argument = share of
            the new batch · `percentile` range that holds that share of the values, in percent · `mse` range with the
            least squared error. The last two are fixed by calibration.
        argument: the observer's number; None stands for the usual one, 0.01 of `ema` and 99.99 of `percentile`.
        learned: scale (and, if not symmetric, zero point) become parameters (LSQ, arXiv:1902.08153).

    `str(scheme)` is the text form, which `Scheme.parse` reads back.

    Raises:
        ValueError: if there is no such observer, or its number is out of range.
        TypeError: if the format or the granularity is none.
    """

    format: IntFormat | FloatFormat
    granularity: Granularity
    symmetric: bool = True
    observer: str = "minmax"
    argument: float | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, IntFormat | FloatFormat):
            must = "a FloatFormat or an IntFormat such as IntFormat(4)"
            raise TypeError(f"Scheme: format must be {must}, got {self.format!r}")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup):
            must = "PerTensor(), PerChannel() or PerGroup(size)"
            raise TypeError(f"Scheme: granularity must be {must}, got {self.granularity!r}")
        if self.observer not in OBSERVERS["act"]:
            raise ValueError(f"Scheme: observer must be one of {', '.join(OBSERVERS['act'])}, got {self.observer!r}")
        if self.argument is None:
            object.__setattr__(self, "argument", DEFAULT_ARGUMENT.get(self.observer))
        _refuse_argument(self.observer, self.argument, repr(self.argument))
        if isinstance(self.format, FloatFormat):
            size = self.format.group_size
            right = self.granularity == PerGroup(size) and self.symmetric and not self.learned
            if not right or self.observer not in FLOAT_OBSERVERS:
                must = f"be symmetric, in groups of {size}, found by {' or '.join(FLOAT_OBSERVERS)}, and not learned"
                raise ValueError(f"Scheme: {self.format.name} must {must}; use Scheme.parse({self.format.name!r})")

    @staticmethod
    def parse(text: str | Scheme, role: Role) -> Scheme:
        """Reads the text form; the defaults are symmetric min-max for weights, asymmetric EMA for activations.

        A scheme is given back, if the role can have it.

        Raises:
            ValueError: if the text does not follow the grammar, or it or the scheme is what the role cannot have.
            TypeError: if it is neither text nor a scheme.
        """
        if isinstance(text, Scheme):
            text._refuse_role(role)
            return text
        if not isinstance(text, str):
            raise TypeError(f"Scheme: {role} must be text such as 'int8@tensor', got {text!r}{_hint(text, role)}")
        try:
            return Scheme._read(text, role)
        except ValueError as error:
            near = "" if "; use" in str(error) else nearest(text, role)
            raise ValueError(f"{error}{near and f'; use {near}'}") from None

    @staticmethod
    def _read(text: str, role: Role) -> Scheme:
        name, *options = text.split(":")
        if name in FLOAT_GROUPS:
            return _floats(name, options, text, role)
        head, at, tail = text.partition("@")
        match = re.fullmatch(r"(u?)int([0-9])", head)
        if not match or not at:
            floats = f" or {'|'.join(FLOAT_GROUPS)}[:{'|'.join(FLOAT_OBSERVERS)}]" if role == "weight" else ""
            raise ValueError(f"Scheme: {role} must look like {GRAMMAR}{floats}, got {text!r}")
        if not 1 <= int(match[2]) <= 8:
            raise ValueError(f"Scheme: {role} must have 1 to 8 bits, got {text!r}")
        words = tail.split(":")
        granularity = _granularity(words, text, role)
        scheme = Scheme(
            format=IntFormat(int(match[2]), signed=not match[1]),
            granularity=granularity,
            symmetric=role == "weight",
            observer=OBSERVERS[role][0],
            argument=DEFAULT_ARGUMENT.get(OBSERVERS[role][0]),
        )
        _refuse_twice(words, text, role)
        for word in words:
            scheme = _apply_word(scheme, word, text, role)
        if role == "act" and not isinstance(scheme.granularity, PerTensor):
            raise ValueError(f"Scheme: activations take one scale per tensor, got {text!r}; use @tensor")
        return scheme

    def _refuse_role(self, role: Role) -> None:
        """Raises ValueError if a weight, or an activation, cannot be quantized so: the text would not be read back."""
        fits = self
        if self.observer not in OBSERVERS[role]:
            must = f"find its range by {', '.join(OBSERVERS[role])}"
            fits = replace(fits, observer=OBSERVERS[role][0], argument=None)
        if role == "act" and not isinstance(self.granularity, PerTensor):
            must, fits = "have one scale per tensor", replace(fits, granularity=PerTensor())
        if isinstance(self.granularity, PerChannel) and self.granularity.axis != 0 and role == "weight":
            must, fits = "have its channels along axis 0, its outputs", replace(fits, granularity=PerChannel(0))
        if fits != self:
            raise ValueError(f"Scheme: {role} must {must}, got {self}; use {str(fits)!r}")

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def is_float(self) -> bool:
        """Says whether the grid is one of 4-bit floats."""
        return isinstance(self.format, FloatFormat)

    @property
    def qmin(self) -> int:
        return self.integers.qmin

    @property
    def qmax(self) -> int:
        return self.integers.qmax

    @property
    def integers(self) -> IntFormat:
        """Returns the format, which must be one of integers."""
        assert isinstance(self.format, IntFormat), f"{self.format.name} is no grid of integers"
        return self.format

    def __str__(self) -> str:
        if isinstance(self.format, FloatFormat):
            return f"{self.format.name}:{self.observer}"
        where = {PerTensor: "tensor", PerChannel: "channel"}.get(type(self.granularity))
        if isinstance(self.granularity, PerGroup):
            where = f"group:{self.granularity.size}"
        short = "" if self.argument is None else f"{self.argument:g}"
        number = "" if self.argument is None else f"={short if float(short) == self.argument else repr(self.argument)}"
        flags = (":lsq" if self.learned else "") + (":sym" if self.symmetric else ":asym")
        narrow = ":narrow" if self.format.narrow else ""
        return f"{'' if self.format.signed else 'u'}int{self.bits}@{where}:{self.observer}{number}{flags}{narrow}"


# what people write elsewhere -> the word here
SYNONYMS = {
    "perchannel": "channel", "axis": "channel", "row": "channel", "output": "channel", "pertensor": "tensor",
    "layer": "tensor", "whole": "tensor", "pergroup": "group", "block": "group", "groupsize": "group", "g": "group",
    "symmetric": "sym", "asymmetric": "asym", "affine": "asym", "learned": "lsq", "learnable": "lsq", "max": "minmax",
    "absmax": "minmax", "average": "ema",
}  # fmt: skip


def nearest(text: str, role: Role) -> str:
    """Guesses the scheme that a malformed text means, quoted; empty if that is not clear."""
    plain = re.sub(r"[\s_-]", "", text.lower())
    both = re.fullmatch(r"w(\d)a(\d+)(?:g(\d+))?", plain)
    if both:
        where = f"group:{both[3]}" if both[3] else "channel"
        act = f"'int{both[2]}@tensor'" if int(both[2]) <= 8 else "None"
        return f"weight='int{both[1]}@{where}', act={act}"
    head = re.match(r"(u?)(?:int|i|w|a|q)?(\d)(?:bits?)?(?!\d)", plain)
    if head is None or "float" in plain or "fp" in plain:
        return ""
    known = ("tensor", "channel", "group", *OBSERVERS[role], "lsq", "sym", "asym", "narrow")
    found: list[str] = []
    for word, number in re.findall(r"([a-z]+)[:=]?([\d.]*)", plain[head.end() :]):
        word = SYNONYMS.get(word, word)
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
        if not close:
            return ""
        numbered = close[0] in DEFAULT_ARGUMENT or close[0] == "group"
        found.append(close[0] + (f"{':' if close[0] == 'group' else '='}{number}" if number and numbered else ""))
    shared = [word for word in found if word.partition(":")[0] in ("tensor", "channel", "group")]
    rest = [word for word in found if word not in shared]
    shared = ["tensor"] if role == "act" else shared or ["channel"]
    guess = f"{head[1]}int{head[2]}@" + ":".join([*shared, *rest])
    try:
        Scheme._read(guess, role)
    except ValueError:
        return ""
    return repr(guess)


def _floats(name: str, options: list[str], text: str, role: Role) -> Scheme:
    if role == "act":
        raise ValueError(f"Scheme: activations are rounded to integers, got {text!r}; use int8@tensor")
    if len(options) > 1 or not set(options) <= set(FLOAT_OBSERVERS):
        raise ValueError(f"Scheme: {name} takes at most one of {', '.join(FLOAT_OBSERVERS)}, got {text!r}")
    format = FloatFormat(name)
    return Scheme(format, PerGroup(format.group_size), observer=options[0] if options else FLOAT_OBSERVERS[0])


def of_integers(text: str | Scheme, who: str) -> Scheme:
    """Parses the scheme of a weight whose grid must be one of integers.

    Raises:
        ValueError: if it is not, or as `Scheme.parse`.
    """
    scheme = Scheme.parse(text, "weight")
    if scheme.is_float:
        raise ValueError(
            f"{who}: weight must be integers, got {str(text)!r}; use int4@group:32, or 4-bit floats in "
            "quantize_weights, or in PTQ without static activations"
        )
    return scheme


def _granularity(words: list[str], text: str, role: Role) -> Granularity:
    """Takes the granularity's words off the front of `words`."""
    kind = words.pop(0)
    if kind == "tensor":
        return PerTensor()
    if kind == "channel":
        return PerChannel(0)
    if kind == "group" and words and re.fullmatch("[0-9]+", words[0]):
        return PerGroup(int(words.pop(0)))
    raise ValueError(f"Scheme: {role} granularity must be tensor, channel or group:N, got {text!r}")


def _refuse_twice(words: list[str], text: str, role: Role) -> None:
    """Raises if two words say the same thing, or contradict each other: the last of them would win unseen."""
    for kind in (OBSERVERS[role], ("sym", "asym"), ("lsq",), ("narrow",)):
        same = [word for word in words if word.partition("=")[0] in kind]
        if len(same) > 1:
            raise ValueError(f"Scheme: {role} must have one of {', '.join(kind)}, got {' and '.join(same)} in {text!r}")


def _apply_word(scheme: Scheme, word: str, text: str, role: Role) -> Scheme:
    name, _, number = word.partition("=")
    if name in OBSERVERS[role]:
        try:
            argument = float(number) if number else DEFAULT_ARGUMENT.get(name)
        except ValueError:
            raise ValueError(f"Scheme: the argument of {name} must be a number, got {text!r}") from None
        _refuse_argument(name, argument, repr(text))
        return replace(scheme, observer=name, argument=argument)
    if word == "lsq":
        return replace(scheme, learned=True)
    if word in ("sym", "asym"):
        return replace(scheme, symmetric=word == "sym")
    if word == "narrow":
        return replace(scheme, format=replace(scheme.integers, narrow=True))
    allowed = ", ".join((*OBSERVERS[role], "lsq", "sym", "asym", "narrow"))
    raise ValueError(f"Scheme: options of {role} are {allowed}, got {word!r} in {text!r}")


def _refuse_argument(observer: str, argument: Any, got: str) -> None:
    """Raises ValueError unless the number of an observer is one that it can have."""
    upper = {"ema": 1.0, "percentile": 100.0}.get(observer)
    if upper is None and argument is not None:
        raise ValueError(f"Scheme: {observer} takes no argument, got {got}")
    number = isinstance(argument, int | float) and not isinstance(argument, bool)
    if upper is not None and not (number and 0 < argument <= upper):
        raise ValueError(f"Scheme: the argument of {observer} must be in (0, {upper:g}], got {got}")


def _hint(value: object, role: Role) -> str:
    """Returns `; use ...` where a grid of SLB was given for a scheme; else ""."""
    from gs_algos.quant.level_grid import LevelGrid

    use = f"int{value.bits}@{'tensor' if role == 'act' else 'channel'}" if isinstance(value, LevelGrid) else ""
    return f"; a LevelGrid is for weights of SLB, use {use!r}" if use else ""


def check_rules(rules: Any, who: str, readers: Mapping[str, Callable[[Any], object]]) -> None:
    """Reads the schemes in rules, so that a wrong one is found before there is a model. Only well-formed rules count.

    readers: name of an option -> what reads its value and raises ValueError or TypeError.
    """
    for rule in rules if isinstance(rules, tuple | list) else ():
        pair = isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], Mapping)
        for name, read in readers.items() if pair else ():
            value = rule[1].get(name)
            if value is None:
                continue
            try:
                read(value)
            except (ValueError, TypeError) as error:
                pattern = rule[0] if isinstance(rule[0], str) else getattr(rule[0], "__name__", repr(rule[0]))
                told = str(error).removeprefix("Scheme: ").removeprefix(f"{who}: ")
                raise type(error)(f"{who}: rule {pattern}: {told}") from None


def join_scheme(value: str | Scheme) -> Scheme:
    """Reads the option `join` of a rule: the scheme that the operands of an add or a concat share."""
    try:
        return Scheme.parse(value, "act")
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("Scheme: act ", "Scheme: join ", 1)) from None


def as_text(rules: Any, kinds: tuple[type, ...] = (Scheme,)) -> Any:
    """Turns the schemes in rules into text, as a checkpoint stores them; what is no rule stays as it is.

    kinds: the classes whose text stands for them.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: str(item) if isinstance(item, kinds) else item for key, item in value.items()}
        return str(value) if isinstance(value, kinds) else value

    if not isinstance(rules, tuple | list):
        return rules
    return tuple((*rule[:1], *map(plain, rule[1:])) if isinstance(rule, tuple | list) else rule for rule in rules)


def n_scales(granularity: Granularity, shape: Sequence[int]) -> int:
    """Counts the scales of a weight `[O, ...]`.

    Raises:
        ValueError: if a group does not divide the elements of one output.
    """
    if isinstance(granularity, PerTensor):
        return 1
    if isinstance(granularity, PerChannel):
        return shape[0]
    inner = math.prod(shape[1:])
    if inner % granularity.size:
        fits = math.gcd(inner, granularity.size)
        raise ValueError(
            f"Scheme: group size must divide the {inner} weights of an output, got {granularity.size}; use group:{fits}"
        )
    return shape[0] * (inner // granularity.size)
