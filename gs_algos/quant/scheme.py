"""How one tensor is quantized, as data and as text: `int8@channel`, `int4@group:128:mse`, `uint8@tensor:ema`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gs_kernels import Granularity, IntFormat, PerChannel, PerGroup, PerTensor

Role = Literal["weight", "act"]
OBSERVERS = {
    "weight": ("minmax", "percentile", "mse"),
    "act": ("ema", "minmax", "percentile", "mse"),
}
DEFAULT_ARGUMENT = {"ema": 0.01, "percentile": 99.99}
GRAMMAR = "[u]int<1..8>@<tensor|channel|group:N>[:<ema|minmax|percentile|mse>[=<number>]][:lsq][:sym|:asym][:narrow]"


@dataclass(frozen=True)
class Scheme:
    """One grid and how its range is found.

    Args:
        format: the integer grid.
        granularity: which elements share a scale; the channel axis of a weight is its output axis.
        symmetric: range [-a, a] (zero point 0 on a signed grid) instead of [min, max].
        observer: `minmax` running extremes (weights: of the current values) · `ema` moving average, argument = share of
            the new batch · `percentile` range that holds that share of the values, in percent · `mse` range with the
            least squared error. The last two are fixed by calibration.
        argument: the observer's number, None where it has none.
        learned: scale (and, if not symmetric, zero point) become parameters (LSQ, arXiv:1902.08153).
    """

    format: IntFormat
    granularity: Granularity
    symmetric: bool
    observer: str
    argument: float | None = None
    learned: bool = False

    @staticmethod
    def parse(text: str | Scheme, role: Role) -> Scheme:
        """Reads the text form; the defaults are symmetric min-max for weights, asymmetric EMA for activations.

        Raises:
            ValueError: if the text does not follow the grammar or asks for what the role cannot have.
            TypeError: if it is neither text nor a scheme.
        """
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f"Scheme: {role} must be text such as 'int8@tensor', got {text!r}")
        try:
            return Scheme._read(text, role)
        except ValueError as error:
            near = "" if "; use" in str(error) else nearest(text, role)
            raise ValueError(f"{error}{near and f'; use {near}'}") from None

    @staticmethod
    def _read(text: str, role: Role) -> Scheme:
        head, at, tail = text.partition("@")
        match = re.fullmatch(r"(u?)int([0-9])", head)
        if not match or not at:
            raise ValueError(f"Scheme: {role} must look like {GRAMMAR}, got {text!r}")
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

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def qmin(self) -> int:
        return self.format.qmin

    @property
    def qmax(self) -> int:
        return self.format.qmax

    def __str__(self) -> str:
        where = {PerTensor: "tensor", PerChannel: "channel"}.get(type(self.granularity))
        if isinstance(self.granularity, PerGroup):
            where = f"group:{self.granularity.size}"
        number = "" if self.argument is None else f"={self.argument:g}"
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
    """What the author of a text that is no scheme will have meant, quoted, or nothing if that is not clear."""
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
        said = [word for word in words if word.partition("=")[0] in kind]
        if len(said) > 1:
            raise ValueError(f"Scheme: {role} must have one of {', '.join(kind)}, got {' and '.join(said)} in {text!r}")


def _apply_word(scheme: Scheme, word: str, text: str, role: Role) -> Scheme:
    name, _, number = word.partition("=")
    if name in OBSERVERS[role]:
        try:
            argument = float(number) if number else DEFAULT_ARGUMENT.get(name)
        except ValueError:
            raise ValueError(f"Scheme: the argument of {name} must be a number, got {text!r}") from None
        upper = {"ema": 1.0, "percentile": 100.0}.get(name)
        if upper is None and argument is not None:
            raise ValueError(f"Scheme: {name} takes no argument, got {text!r}")
        if upper is not None and not 0 < float(argument or 0) <= upper:
            raise ValueError(f"Scheme: the argument of {name} must be in (0, {upper:g}], got {text!r}")
        return replace(scheme, observer=name, argument=argument)
    if word == "lsq":
        return replace(scheme, learned=True)
    if word in ("sym", "asym"):
        return replace(scheme, symmetric=word == "sym")
    if word == "narrow":
        return replace(scheme, format=replace(scheme.format, narrow=True))
    allowed = ", ".join((*OBSERVERS[role], "lsq", "sym", "asym", "narrow"))
    raise ValueError(f"Scheme: options of {role} are {allowed}, got {word!r} in {text!r}")


def as_text(rules: Any) -> Any:
    """Rules whose schemes are text, as a checkpoint keeps them; whatever is no rule stays as it is."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: str(item) if isinstance(item, Scheme) else item for key, item in value.items()}
        return value

    if not isinstance(rules, tuple | list):
        return rules
    return tuple((*rule[:1], *map(plain, rule[1:])) if isinstance(rule, tuple | list) else rule for rule in rules)


def n_scales(granularity: Granularity, shape: Sequence[int]) -> int:
    """How many scales a weight of `shape [O, ...]` has.

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
