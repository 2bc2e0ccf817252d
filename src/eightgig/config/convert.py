"""YAML nodes to the types of the settings, and these types in words.

Reading is led by the type a setting has, from the text as written: `2e-4` is a number where a
number is wanted (YAML 1.1 calls it text), `0123` is a commit where text is wanted.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml

from eightgig.config.settings import SIZE
from eightgig.units import parse_bytes

_TAG = "tag:yaml.org,2002:"
_NUMBERS = frozenset({"int", "float"})
_TRUE = frozenset({"true", "yes", "on"})


class WrongTypeError(Exception):
    """A value is not of the type its setting has; the text says what was found."""


def convert(hint: Any, node: yaml.Node) -> Any:
    """The value of `node` as `hint`, the type of a setting.

    Raises:
        WrongTypeError: It is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, node)
    if origin is Annotated:
        return _convert_size(node) if SIZE in arguments else convert(arguments[0], node)
    if origin is Literal:
        return _convert_literal(arguments, node)
    if origin is tuple:
        return _convert_list(arguments[0], node)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(node)
    return _convert_scalar(hint, node)


def describe_type(hint: Any) -> str:
    """`hint` in words, to follow "Write": `a whole number or "auto"`."""
    return _join([words for part in _leaves(hint) for words in _describe_leaf(part)])


def accepts_numbers(hint: Any) -> bool:
    """Whether a plain number is a value of `hint`."""
    return any(leaf in (int, float) or SIZE in typing.get_args(leaf) for leaf in _leaves(hint))


def accepts_text(hint: Any) -> bool:
    """Whether any text is a value of `hint`."""
    return str in _leaves(hint)


def literal_options(hint: Any) -> tuple[str, ...]:
    """The words `hint` allows, where it allows only certain words."""
    options = [typing.get_args(leaf) for leaf in _leaves(hint) if _is_literal(leaf)]
    return tuple(word for words in options for word in words)


def kind_of(node: yaml.Node) -> str:
    """`int`, `float`, `bool`, `null`, `str`, `seq`, `map`, or a tag that is not read."""
    tag = node.tag or ""
    kind = tag.removeprefix(_TAG)
    if not tag.startswith(_TAG):
        return tag
    # A date is text to every setting.
    return "str" if kind == "timestamp" else kind


def describe_node(node: yaml.Node) -> str:
    """What stands there, in words, for a message."""
    kind = kind_of(node)
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    text = str(node.value)
    text = text if len(text) <= 60 else text[:57] + "..."
    if kind in _NUMBERS:
        return f"the number {text}"
    if kind == "null":
        return "nothing"
    return text if kind == "bool" else f'the text "{text}"'


def mark_as_text(node: yaml.Node) -> None:
    """Read a plain number as text from here on."""
    node.tag = f"{_TAG}str"


def _leaves(hint: Any) -> Iterable[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [leaf for part in typing.get_args(hint) for leaf in _leaves(part)]
    return [hint]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _describe_leaf(hint: Any) -> list[str]:
    if _is_literal(hint):
        return [f'"{word}"' for word in typing.get_args(hint)]
    if SIZE in typing.get_args(hint):
        return ["a size such as 8GiB"]
    origin = typing.get_origin(hint) or hint
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple: "a list of texts",
        type(None): "null",
    }
    return [names.get(origin, "a mapping of text to text")]


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _convert_union(options: tuple[Any, ...], node: yaml.Node) -> Any:
    # Words first: "auto" is not text where it has a meaning of its own.
    for option in sorted(options, key=lambda option: not _is_literal(option)):
        try:
            return convert(option, node)
        except WrongTypeError:
            continue
    raise WrongTypeError(describe_node(node))


def _convert_literal(options: tuple[Any, ...], node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode) and node.value in options:
        return str(node.value)
    raise WrongTypeError(describe_node(node))


def _convert_list(item: Any, node: yaml.Node) -> tuple[Any, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise WrongTypeError(describe_node(node))
    return tuple(convert(item, value) for value in node.value)


def _convert_mapping(node: yaml.Node) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        raise WrongTypeError(describe_node(node))
    return {convert(str, key): convert(str, value) for key, value in node.value}


def _convert_size(node: yaml.Node) -> int:
    if not isinstance(node, yaml.ScalarNode) or kind_of(node) not in {"int", "str"}:
        raise WrongTypeError(describe_node(node))
    try:
        return parse_bytes(node.value)
    except ValueError:
        raise WrongTypeError(describe_node(node)) from None


def _convert_scalar(hint: Any, node: yaml.Node) -> Any:
    kind = kind_of(node)
    if not isinstance(node, yaml.ScalarNode):
        raise WrongTypeError(describe_node(node))
    if hint is type(None) and kind == "null":
        return None
    if hint is bool and kind == "bool":
        return node.value.lower() in _TRUE
    if hint is str and kind == "str":
        return str(node.value)
    # A quoted number is text; a plain one that YAML takes for text (2e-4) is not.
    if hint in (int, float) and kind in {*_NUMBERS, "str"} and node.style is None:
        return _convert_number(hint, node)
    raise WrongTypeError(describe_node(node))


def _convert_number(hint: type[int] | type[float], node: yaml.ScalarNode) -> int | float:
    try:
        number = hint(node.value)
    except ValueError:
        raise WrongTypeError(describe_node(node)) from None
    if not math.isfinite(number):
        raise WrongTypeError(describe_node(node))
    return number
