"""Defines options of an algorithm: a frozen dataclass that is made from keywords and goes through JSON unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from gs_algos.core.did_you_mean import did_you_mean
from gs_algos.core.layer_rules import rules_of


def signature_of(cls: Any) -> inspect.Signature:
    """Returns the signature of an algorithm's class with every option as a keyword, for type checkers and editors.

    cls: has a `config_class`, whose fields are the options; what else it takes is that of its `__init__`.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = list(inspect.signature(cls.__init__).parameters.values())
    if own[-1].kind is not inspect.Parameter.VAR_KEYWORD or not hasattr(cls, "config_class"):
        return inspect.Signature(own[1:])  # a class that takes no options by keyword, or has none yet
    own.pop()
    names = {parameter.name for parameter in own}
    options = [
        inspect.Parameter(option.name, keyword, default=option.default, annotation=option.type)
        for option in fields(cls.config_class)
        if option.name not in names
    ]
    first, rest = [p for p in own[1:] if p.kind is not keyword], [p for p in own[1:] if p.kind is keyword]
    return inspect.Signature([*first, *options, *rest])


@dataclass(frozen=True)
class AlgorithmConfig:
    """Holds an algorithm's options: frozen, checked in `__post_init__`, made of plain JSON values and tuples.

    who: the algorithm's class, for messages.
    """

    who: ClassVar[str]

    @classmethod
    def choose(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """Returns the config that was given, or one of the options that were given by keyword.

        Raises:
            ValueError: if there are both, or an option has a wrong value.
            TypeError: if there is no such option.
        """
        if config is not None and options:
            given = ", ".join(options)
            raise ValueError(f"{cls.who}: options come either in a config or by keyword, got both ({given})")
        names = [option.name for option in fields(cls)]
        for option in options.keys() - names:
            near = did_you_mean(option, names)
            raise TypeError(f"{cls.who}: options are {', '.join(names)} and process_group, got {option}{near}")
        return config or cls.from_dict(options)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes the config of these options; lists, as JSON has them, become tuples."""
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        if "rules" in options:
            options["rules"] = rules_of(options["rules"], cls.who)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON; a rule on a module class becomes `type:Name`."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        if "rules" in options:
            options["rules"] = [
                [p if isinstance(p, str) else f"type:{p.__name__}", v if v is None else dict(v)]
                for p, v in options["rules"]
            ]
        return options
