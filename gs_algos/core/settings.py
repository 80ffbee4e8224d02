"""The form of what a plan's rows keep in a checkpoint, by the name of the setting, whichever algorithm wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_count, value))


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _activation(value: Any) -> bool:
    """The module that a converted layer takes over and its operation; a flag in searches of an earlier version."""
    return value is None or _flag(value) or (_texts(value) and len(value) == 2)


FORMS: dict[str, Callable[[Any], bool]] = {
    "weight": _text,
    **dict.fromkeys(("act", "bn", "fold", "output"), _text_or_none),
    **dict.fromkeys(("tail", "readers", "take_codes", "notes", "operands", "names", "layers"), _texts),
    **dict.fromkeys(("takes_codes", "fused_optimizer", "hands_codes", "hands_own", "hands_values", "defers"), _flag),
    **dict.fromkeys(("units", "channels"), _count),
    "format": lambda value: _object(value) and _counts(value.get("shape")),
    "follows": lambda value: _object(value) and not wrong_setting({f"follows.{key}": value[key] for key in value}),
    "follows.activation": _text_or_none,
    "follows.reason": _text,
    **dict.fromkeys(("follows.adds", "follows.returned"), _flag),
    "fused": _activation,
    "shape": _counts,
}


def wrong_setting(settings: Mapping[str, Any]) -> str:
    """The first setting of a row from a file that has another form than its name says; empty if there is none."""
    wrong = (name for name, value in settings.items() if name in FORMS and not FORMS[name](value))
    return next((f"{name}={settings[name]!r:.60}" for name in wrong), "")
