"""The form of JSON answers, inferred from references: keys, which of them are always there, types.

What references show is what is asked of answers: no key that none of them has, none of those that
all of them have left out, and no type that none of them has in that place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NAMES = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """What may stand in one place.

    Attributes:
        types: JSON types seen there.
        fields: Of objects: what stands under each key.
        required: Keys that every object has.
        items: Of lists: what their elements are; None where only empty ones were seen.
    """

    types: frozenset[str]
    fields: Mapping[str, Schema]
    required: frozenset[str]
    items: Schema | None

    def accepts(self, value: Any) -> bool:
        """Whether `value` has this form."""
        if json_type(value) not in self.types:
            return False
        if isinstance(value, dict):
            known = set(value) <= set(self.fields) and self.required <= set(value)
            return known and all(self.fields[key].accepts(item) for key, item in value.items())
        if isinstance(value, list):
            items = self.items
            return not value or (items is not None and all(map(items.accepts, value)))
        return True


def infer_schema(values: Sequence[Any]) -> Schema:
    """The form that all of `values` have."""
    objects = [value for value in values if isinstance(value, dict)]
    elements = [item for value in values if isinstance(value, list) for item in value]
    keys = {key for value in objects for key in value}
    return Schema(
        types=frozenset(map(json_type, values)),
        fields={
            key: infer_schema([value[key] for value in objects if key in value])
            for key in sorted(keys)
        },
        required=frozenset(key for key in keys if all(key in value for value in objects)),
        items=infer_schema(elements) if elements else None,
    )


def json_type(value: Any) -> str:
    """Name of the JSON type of `value`; whole numbers and fractions are both numbers."""
    if isinstance(value, dict):
        return "object"
    return "array" if isinstance(value, list) else _NAMES[type(value)]


def describe_schema(schema: Schema) -> str:
    """`schema` in one line: `{name: string, age?: number}`."""
    parts = []
    for name in sorted(schema.types):
        if name == "object":
            fields = (
                f"{key}{'' if key in schema.required else '?'}: {describe_schema(field)}"
                for key, field in schema.fields.items()
            )
            parts.append("{" + ", ".join(fields) + "}")
        elif name == "array":
            parts.append(f"[{describe_schema(schema.items)}]" if schema.items else "[]")
        else:
            parts.append(name)
    return " | ".join(parts)
