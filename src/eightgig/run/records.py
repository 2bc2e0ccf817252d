"""Records to plain JSON and back, with every field's type checked on the way."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

RecordT = TypeVar("RecordT")


def to_json(value: Any) -> Any:
    """Plain JSON of a record: dataclasses become objects, tuples lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[RecordT], value: Any) -> RecordT:
    """A record of type `kind` from what `to_json` made of it.

    Raises:
        ValueError: A field is missing, unknown, or of another type.
    """
    converted = _convert(kind, value, kind.__name__)
    return typing.cast("RecordT", converted)


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_record(hint, value, place)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, place)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{place}: {value!r} is none of {arguments}")
    if origin is tuple:
        return _convert_tuple(arguments, value, place)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place}: expected an object, found {value!r}")
        return {key: _convert(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, place)


def _convert_scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{place}: an integer beyond every float") from error
    if hint in (None, type(None)) and value is None:
        return None
    is_bool_for_number = isinstance(value, bool) and hint is not bool
    if isinstance(hint, type) and isinstance(value, hint) and not is_bool_for_number:
        return value
    raise ValueError(f"{place}: expected {getattr(hint, '__name__', hint)}, found {value!r}")


def _convert_union(options: tuple[Any, ...], value: Any, place: str) -> Any:
    for option in options:
        try:
            return _convert(option, value, place)
        except ValueError:
            continue
    raise ValueError(f"{place}: {value!r} is none of the allowed types")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{place}: expected a list, found {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{place}: expected {len(arguments)} items, found {len(value)}")
    items = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{place}[{i}]") for i, (hint, item) in enumerate(items))


def _convert_record(kind: type[Any], value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: expected an object, found {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{place}: unknown field {unknown[0]!r}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{place}: missing field {missing[0]!r}")
    return kind(**{n: _convert(hints[n], item, f"{place}.{n}") for n, item in value.items()})
