"""Per-layer rules: which settings a layer gets. Global, then type, then regular expression, then name; last wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

RulePattern: TypeAlias = str | type[nn.Module]
Rule: TypeAlias = tuple[RulePattern, Mapping[str, Any] | None]


def resolve(
    rules: Sequence[Rule], sites: Mapping[str, nn.Module | None], defaults: Mapping[str, Any], who: str
) -> dict[str, dict[str, Any] | None]:
    """Settings of every site: the defaults, overridden rule by rule. None means that a rule leaves the site alone.

    A pattern is a module class or `type:Conv2d`, `re:<expression>` (matched against the whole name), or the exact name
    of a layer or of a block that holds it.

    Raises:
        ValueError: if a rule matches no site, or sets an option that does not exist.
    """
    settings: dict[str, dict[str, Any] | None] = {name: dict(defaults) for name in sites}
    for _, rule in sorted(enumerate(rules), key=lambda pair: (_precedence(pair[1][0]), pair[0])):
        pattern, values = rule
        unknown = set(values or ()) - set(defaults)
        if unknown:
            raise ValueError(
                f"{who}: a rule may set {', '.join(defaults)}, got {', '.join(sorted(unknown))} in rule {pattern!r}"
            )
        hit = [name for name, module in sites.items() if _matches(pattern, name, module)]
        if not hit:
            some = ", ".join(list(sites)[:8]) + (", ..." if len(sites) > 8 else "")
            raise ValueError(f"{who}: every rule must match a layer, got {pattern!r} which matches none of: {some}")
        for name in hit:
            current = settings[name]
            settings[name] = None if values is None else {**(defaults if current is None else current), **values}
    return settings


def _precedence(pattern: RulePattern) -> int:
    if isinstance(pattern, type) or pattern.startswith("type:"):
        return 0
    return 1 if pattern.startswith("re:") else 2


def _matches(pattern: RulePattern, name: str, module: nn.Module | None) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("type:"):
        return any(base.__name__ == pattern[5:] for base in type(module).__mro__)
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")
