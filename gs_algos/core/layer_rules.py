"""Rules that set options layer by layer: global, then by type, by regular expression, by name; the last one wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from gs_algos.core.did_you_mean import did_you_mean

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a whole part of a qualified name

RulePattern: TypeAlias = str | type[nn.Module]
Rule: TypeAlias = tuple[RulePattern, Mapping[str, Any] | None]


def resolve(
    rules: Sequence[Rule], sites: Mapping[str, nn.Module | None], defaults: Mapping[str, Any], who: str
) -> dict[str, dict[str, Any] | None]:
    """Returns the settings of every site: the defaults, overridden rule by rule; None where a rule leaves it alone.

    A pattern is a module class or `type:Conv2d`, `re:<expression>` (matched against the whole name), or the exact name
    of a layer or of a block that holds it.

    Raises:
        ValueError: if a rule is malformed, matches no site, or sets an option that does not exist.
    """
    settings: dict[str, dict[str, Any] | None] = {name: dict(defaults) for name in sites}
    checked = [_checked(rule, defaults, who) for rule in rules]
    for pattern, values in sorted(checked, key=lambda rule: _precedence(rule[0])):
        hit = [name for name, module in sites.items() if _matches(pattern, name, module)]
        if not hit:
            some = ", ".join(list(sites)[:8]) + (", ..." if len(sites) > 8 else "")
            raise ValueError(
                f"{who}: every rule must match a layer, got {_text(pattern)} which matches none of: {some}"
                f"{did_you_mean(_text(pattern), _matchable(sites))}"
            )
        for name in hit:
            current = settings[name]
            settings[name] = None if values is None else {**(defaults if current is None else current), **values}
    return settings


def rules_of(rules: Any, who: str) -> tuple[Any, ...]:
    """Returns the rules as a tuple of tuples; `resolve` checks each.

    Raises:
        TypeError: if they are no list of rules: a dict, or one rule by itself.
    """
    must = f"{who}: rules must be a list of (pattern, options), got"
    if isinstance(rules, Mapping):
        raise TypeError(f"{must} a dict; use {list(rules.items())!r}")
    if not isinstance(rules, tuple | list):
        raise TypeError(f"{must} {rules!r}; for example [('fc', None)]")
    single = (
        len(rules) == 2 and isinstance(rules[0], str | type) and (rules[1] is None or isinstance(rules[1], Mapping))
    )
    if single:
        raise TypeError(f"{must} one rule; use [{tuple(rules)!r}]")
    return tuple(tuple(rule) if isinstance(rule, list) else rule for rule in rules)


def _checked(rule: Any, options: Mapping[str, Any], who: str) -> Rule:
    """Checks and returns a rule; `options` are those that it may set, with their defaults.

    Raises:
        ValueError: if it is no pair of a pattern and options, its expression is no expression, or an option is unknown.
    """
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str | type):
        raise ValueError(f"{who}: a rule must be (pattern, options), got {rule!r}; for example ('fc', None)")
    pattern, values = rule
    if values is not None and not isinstance(values, Mapping):
        first = next(iter(options), "")
        kind: Any = (str, int, float) if options.get(first) is None else type(options[first])
        use = f"; use {{{first!r}: {values!r}}}" if first and isinstance(values, kind) else ""
        raise ValueError(f"{who}: the options of rule {_text(pattern)} must be a dict or None, got {values!r}{use}")
    for option in sorted(set(values or ()) - set(options)):
        raise ValueError(
            f"{who}: a rule may set {', '.join(options)}, got {option} in rule {_text(pattern)}"
            f"{did_you_mean(option, options)}"
        )
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{who}: a rule must hold a regular expression, got {pattern}: {error}") from error
    return pattern, values


def _text(pattern: RulePattern) -> str:
    """Returns the pattern as a person would write it."""
    return pattern if isinstance(pattern, str) else f"type:{pattern.__name__}"


def _matchable(sites: Mapping[str, nn.Module | None]) -> list[str]:
    """Lists what a rule could have meant: layers, the blocks that hold them, their classes."""
    blocks = {name[:i] for name in sites for i, letter in enumerate(name) if letter == "."}
    return [*sites, *sorted(blocks), *sorted({f"type:{type(module).__name__}" for module in sites.values()})]


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


def rules_for(schemes: Mapping[str, str], option: str = "weight") -> tuple[Rule, ...]:
    """Returns rules that give each layer its scheme.

    Layers whose names differ in one number share a part of an expression.

    schemes: layer -> scheme; option: what of the layer has it.
    """
    rules: list[Rule] = []
    for scheme in dict.fromkeys(schemes.values()):
        names = [name for name, own in schemes.items() if own == scheme]
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(_NUMBER.sub("#", f".{name}")[1:], []).append(name)
        parts = [part for template, own in alike.items() for part in _expressions(template, own)]
        rules.append((names[0] if len(names) == 1 else f"re:{'|'.join(parts)}", {option: scheme}))
    return tuple(rules)


def _expressions(template: str, names: Sequence[str]) -> list[str]:
    """Returns expressions that match these names and no others. template: the names with # for their numbers."""
    if template.count("#") != 1 or len(names) == 1:
        return [re.escape(name) for name in names]
    before, after = template.split("#")
    numbers = (name.removeprefix(before).removesuffix(after) for name in names)
    return [f"{re.escape(before)}({'|'.join(numbers)}){re.escape(after)}"]
