"""Defines frozen dataclasses for what `apply` and `load` need of a plan's row: written as JSON, checked when read.

A class names its fields and their types; `from_dict` takes nothing else, whoever wrote the file.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

WORDS = {str: "a text", bool: "true or false", int: "a whole number >= 0", float: "a number", type(None): "nothing"}


@dataclass(frozen=True)
class Record:
    """Reads and writes a dataclass of a plan as JSON; the base of all of them.

    Fields are texts, flags, counts >= 0, numbers, records, tuples of one of these, or any of them `| None`. A class
    with a `to_dict` and a `from_dict` of its own, as `PackedFormat` has them, may be one too.
    """

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Reads what `to_dict` gave. A field with a default may be missing: an earlier release may have lacked it.

        Raises:
            ValueError: if another field is missing, one has another form, or there is one that the class lacks.
        """
        return _record(cls, data, cls.__name__, "")


@dataclass(frozen=True)
class RowSettings(Record):
    """Marks what an algorithm keeps in the rows of its plan; the base of all of them.

    form: tells the classes of one algorithm apart in a file.
    """

    form: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return {"form": self.form, **super().to_dict()}

    def other_names(self) -> tuple[str, ...]:
        """Returns the layers besides `row.site` that the row speaks of."""
        return ()


def settings_of(data: Any, forms: tuple[type[RowSettings], ...]) -> RowSettings | None:
    """Reads the settings of a row, of one of the classes of an algorithm; None stays None.

    Raises:
        ValueError: as `Record.from_dict`; or if they are of no such class.
    """
    if data is None:
        return None
    form = data.get("form") if isinstance(data, Mapping) else data
    classes = {cls.form: cls for cls in forms}
    if not isinstance(form, str) or form not in classes:
        raise ValueError(f"settings must be of the form {' or '.join(classes) or 'null'}, got form={form!r:.60}")
    return classes[form].from_dict({key: value for key, value in data.items() if key != "form"})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def _record(cls: type[Any], data: Any, who: str, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{who}: {path or 'a record'} must be an object, got {path or who}={data!r:.60}")
    hints = get_type_hints(cls)
    by_name = {field.name: field for field in fields(cls)}
    for key in data.keys() - by_name.keys():
        raise ValueError(f"{who}: {path or 'a record'} must have no fields but {', '.join(by_name)}, got {key!r:.60}")
    values = {}
    for name, field in by_name.items():
        where = f"{path}.{name}" if path else name
        if name in data:
            values[name] = _value(hints[name], data[name], who, where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{who}: {where} must be {_words(hints[name])}, got none")
    return cls(**values)


def _value(hint: Any, data: Any, who: str, where: str) -> Any:
    """Reads the value of one field."""
    words = _words(hint)
    if get_origin(hint) in (types.UnionType, Union):
        if data is None and type(None) in get_args(hint):
            return None
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is tuple and isinstance(data, list | tuple):
        return tuple(_value(get_args(hint)[0], item, who, f"{where}[{i}]") for i, item in enumerate(data))
    if isinstance(hint, type) and issubclass(hint, Record):
        return _record(hint, data, who, where)
    if hasattr(hint, "from_dict"):
        try:
            return hint.from_dict(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: {where} must be {words}, got {where}={data!r:.60}: {error}") from error
    right = type(data) is hint and not (hint is int and data < 0)
    if not (right or (hint is float and type(data) is int)):
        raise ValueError(f"{who}: {where} must be {words}, got {where}={data!r:.60}")
    return data


def _words(hint: Any) -> str:
    """Describes what a field holds, for an error."""
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(_words(kind) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_words(get_args(hint)[0])}"
    return WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
