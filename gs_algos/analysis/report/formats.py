"""Writes numbers for people: three significant digits, SI units, and words for what is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def words(value: float) -> str:
    """Returns the words for NaN or an infinity, "" for a number."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return ""


def significant(value: float | None, digits: int = 3) -> str:
    """Writes a number with so many significant digits; very small and very large ones with a power of ten."""
    if value is None:
        return NONE
    if words(value):
        return words(value)
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    mantissa, power = text.split("e")
    exponent = int(power)
    if -4 < exponent < 5:
        return f"{float(text):,.{max(0, digits - 1 - exponent)}f}".replace("-", MINUS)
    return f"{mantissa}{SPACE}{TIMES}{SPACE}10{str(exponent).translate(_SUPERSCRIPTS)}".replace("-", MINUS)


def _scaled(value: float | None, units: Sequence[str]) -> str:
    if value is None:
        return NONE
    if words(value):
        return words(value)
    rounded = float(f"{value:.2e}")
    power = 0 if abs(rounded) < 1000 else min(len(units) - 1, math.floor(math.log10(abs(rounded)) / 3))
    scaled = rounded / 1000**power
    text = f"{scaled:,.0f}" if power == 0 and scaled == int(scaled) else significant(scaled)
    return f"{text}{SPACE}{units[power]}".rstrip().replace("-", MINUS)


def size(nbytes: float | None) -> str:
    """Writes bytes: `4.61 MB` is 4.61 times 10^6."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(value: float | None) -> str:
    """Writes a count: `4.65 M` is 4.65 times 10^6."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"))


def milliseconds(value: float | None) -> str:
    if value is None or words(value):
        return significant(value)
    return f"{significant(value)}{SPACE}ms"


def percent(share: float | None) -> str:
    """Writes a share of 1 in percent: one decimal, and more below 1 %."""
    if share is None or words(share):
        return significant(share)
    number = 100 * share
    text = f"{number:.1f}" if 1 <= abs(number) < 1e5 or number == 0 else significant(number, 2)
    return f"{text}{SPACE}%".replace("-", MINUS)


def decibels(value: float | None) -> str:
    """Writes a signal-to-noise ratio; an infinite one is `exact`."""
    if value is not None and value == math.inf:
        return "exact"
    if value is None or words(value):
        return significant(value)
    return f"{value:.1f}{SPACE}dB".replace("-", MINUS)


def nats(value: float | None) -> str:
    if value is None or words(value):
        return significant(value)
    return f"{significant(value)}{SPACE}nats"


def change(before: float | None, after: float | None, less: str, more: str, same: str) -> str:
    """Says by what factor a number grew or shrank, such as `4.05x smaller`; "" where no factor can tell."""
    if before is None or after is None:
        return ""
    if not (math.isfinite(before) and math.isfinite(after) and before > 0 and after > 0):
        return ""
    factor = max(before, after) / min(before, after)
    if factor < 1.005:
        return same
    return f"{significant(factor)}{TIMES} {less if after < before else more}"


def relative_error(sqnr: float) -> float:
    """Returns the relative RMS error that a signal-to-noise ratio in dB stands for."""
    return 0.0 if sqnr == math.inf else 10.0 ** min(-sqnr / 20, 300.0)
