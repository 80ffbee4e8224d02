"""Builds HTML and SVG in which every text is escaped, because only what `tag` returns is markup."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

LONGEST = 64  # characters of a layer's name that are shown; the middle of a longer one is left out


class Html(str):
    """Holds markup. Any other string is text, and `tag` escapes it."""


Node: TypeAlias = "str | Iterable[Node] | None"
Attribute: TypeAlias = "str | float | bool | None"

VOID = ("col", "meta", "wbr")


def tag(name: str, /, *children: Node, **attributes: Attribute) -> Html:
    """Returns an element. Its strings are escaped unless they are `Html`; None and "" are left out.

    Args:
        attributes: `class_` is `class`, other `_` are `-`; True stands for an attribute without a value, None and False
            for none. Numbers are written with two decimals at most.
    """
    pairs = (_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    head = f"<{name}{''.join(pairs)}>"
    return Html(head if name in VOID else f"{head}{join(children)}</{name}>")


def join(children: Node) -> Html:
    """Returns children one behind the other, text among them escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(escape(visible(children), quote=True))
    return Html("".join(map(join, children)))


def number(value: float) -> str:
    """Writes a coordinate: two decimals at most, no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def visible(text: str, also: str = "\n\t") -> str:
    """Returns a text whose control and formatting characters, and lone surrogates, are written as escapes.

    also: of those, the characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in also or not unicodedata.category(char).startswith("C") else ascii(char)[1:-1] for char in text
    )


def layer_name(site: str, longest: int = LONGEST) -> str:
    """Returns the name of a layer as it is shown, on one line and not too long."""
    shown = visible(site[: 4 * longest] if len(site) > 8 * longest else site, also="")
    if len(site) > 8 * longest:
        shown += visible(site[-4 * longest :], also="")
    if len(shown) > longest:
        ahead = longest // 2
        shown = f"{shown[:ahead]}…{shown[len(shown) - longest + ahead + 1 :]}"
    return shown or "(the whole network)"


def breakable(text: Node) -> Node:
    """Lets a line break behind each : and = of a text such as a scheme; markup stays as it is."""
    if not isinstance(text, str) or isinstance(text, Html):
        return text
    parts = re.split(r"(?<=[:=])(?=\S)", text)
    return [parts[0], *([tag("wbr"), part] for part in parts[1:])]


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = value if isinstance(value, str) else number(value)
    return f' {name}="{escape(visible(text), quote=True)}"'
