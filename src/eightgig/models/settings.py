"""Typed reading of a config.json that nobody vouches for.

Every value is checked for type and size before it is used, because sizes become allocations.
Unknown keys are left alone: a config holds much that is none of our business (`auto_map`,
`attn_implementation`, ...), and nothing in it is ever imported or run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from eightgig.errors import ModelError

MAX_LAYERS = 1_024
MAX_HEAD_DIM = 8_192
MAX_HEADS = 65_536
MAX_SIZE = 1 << 20
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 31
MAX_TOKEN_ID = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of one config, with the defaults of its class.

    Attributes:
        name: Model, for error messages.
        values: What config.json says.
        defaults: What holds where it says nothing.
    """

    name: str
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The raw value, or the default."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer in [low, high].

        Raises:
            ModelError: It is not.
        """
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """An integer in [low, high], or None where the value is null.

        Raises:
            ModelError: It is neither.
        """
        return None if self.get(key) is None else self.integer(key, low=low, high=high)

    def number(self, key: str, *, low: float, high: float) -> float:
        """A finite number with low < number <= high.

        Raises:
            ModelError: It is not.
        """
        value = self.get(key)
        if not is_number(value) or not low < value <= high:
            self.refuse(key, f"a number above {low:g}, up to {high:g}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """A boolean; null counts as false.

        Raises:
            ModelError: It is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def strings(self, key: str, *, allowed: Sequence[str], count: int) -> list[str] | None:
        """A list of `count` of the `allowed` words, or None where the value is null.

        Raises:
            ModelError: It is neither.
        """
        value = self.get(key)
        if value is None:
            return None
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or any(word not in allowed for word in value):
            self.refuse(key, f"a list of {count} of: {', '.join(allowed)}")
        return [str(word) for word in value]

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object; null counts as an empty one.

        Raises:
            ModelError: It is something else.
        """
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.refuse(key, "an object of settings")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids, given as one number, a list or null.

        Raises:
            ModelError: It is none of these.
        """
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > 1_000 or not all(_is_token_id(token) for token in ids):
            self.refuse(key, "a token id or a list of token ids")
        return tuple(ids)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Say that the value of `key` is not what is `expected`.

        Raises:
            ModelError: Always.
        """
        shown = repr(self.get(key))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ModelError(
            f"The config of {self.name} sets `{key}` to {shown}.",
            why=f"`{key}` must be {expected}; the decoder's shape depends on it.",
            fix="Download config.json again from the model's source, or choose another model.",
        )


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (and no boolean)."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) < 1e300 and math.isfinite(value)  # type: ignore[arg-type]


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID
