"""Chat templates, rendered as Transformers and the servers built on it render them.

The environment is Transformers' own (immutable sandbox, trim_blocks, lstrip_blocks, loop controls,
`{% generation %}`, tojson without HTML escapes), so that processes that render rows need not
import it; a test compares the two. Templates are foreign code: they see plain JSON values only,
and are stopped when they take too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eightgig.data.turns import Message
from eightgig.errors import DataError

MAX_TEMPLATE_CHARS = 200_000
RENDER_SECONDS = 2.0

# A template that met its limits this often would do so for every row.
_LIMITS_TO_GIVE_UP = 2


class TemplateRefused(Exception):
    """The template does not render this conversation; the text says why."""


class RenderingLimit(Exception):
    """Rendering, or tokenising what was rendered, took too long or too much memory."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` of training templates: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    known = {"ensure_ascii": False, "indent": None, "separators": None, "sort_keys": False}
    return json.dumps(value, **{**known, **options})


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name it
    return datetime.now().strftime(format)


class ChatTemplate:
    """One compiled template with the special tokens it writes.

    Args:
        source: The template.
        special_tokens: `bos_token`, `eos_token` and so on, as the tokenizer names them.
        memory_bytes: What rendering may take beyond what the process has; None takes anything.

    Raises:
        DataError: The template is no valid Jinja, or too large.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], *, memory_bytes: int | None = None
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise DataError(
                f"The chat template has {len(source):,} characters.",
                why=f"More than {MAX_TEMPLATE_CHARS:,} are no chat template.",
                fix="Set `data.chat_template` to the template of the model's publisher.",
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._memory_bytes = memory_bytes
        self._limits_met = 0
        try:
            environment = _environment()
            parsed = environment.parse(source)
            if parsed.find(jinja2.nodes.EvalContextModifier) is not None:
                # Its value is worked out while it compiles, here and without limits.
                raise jinja2.TemplateError("the tag autoescape is not for chats")
            self._template = environment.from_string(parsed)
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise DataError(
                f"The chat template is no valid Jinja: {error}.",
                why="Nothing can be rendered with it.",
                fix="Correct it, or set `data.chat_template` to another one.",
            ) from error

    @property
    def can_think(self) -> bool:
        """Whether a server can switch reasoning on and off."""
        return "enable_thinking" in self.source

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool = False,
    ) -> str:
        """The text of `messages`.

        Args:
            messages: Turns of plain JSON values.
            tools: Tool schemas; none if empty.
            add_generation_prompt: Whether the assistant's turn is opened at the end.
            thinking: Switch reasoning on; otherwise it stays as servers have it by default.

        Raises:
            TemplateRefused: The template does not take this conversation.
            RenderingLimit: It takes too long, or too much memory.
        """
        extra = {"enable_thinking": True} if thinking and self.can_think else {}
        if self._limits_met >= _LIMITS_TO_GIVE_UP:
            raise RenderingLimit("so did the rows before it")
        try:
            with _time_limit(RENDER_SECONDS), _memory_limit(self._memory_bytes):
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                    **extra,
                )
        except RenderingLimit:
            self._limits_met += 1
            raise
        except MemoryError as error:
            self._limits_met += 1
            raise RenderingLimit("rendering takes too much memory") from error
        # Whatever an expression in a template can raise on values it did not expect.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError,
                RecursionError, TypeError, ValueError) as error:  # fmt: skip
            raise TemplateRefused(str(error) or type(error).__name__) from error


# Methods of plain values that change nothing, which templates call for every message.
_HARMLESS = frozenset(
    {"get", "items", "keys", "values", "split", "rsplit", "strip", "lstrip", "rstrip",
     "startswith", "endswith", "upper", "lower", "title", "capitalize", "find", "count"}
)  # fmt: skip
_DICT_NAMES = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with short ways for what templates do with plain values all the time.

    They give what the sandbox gives; they only leave out questions whose answer is known.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _HARMLESS and type(obj) in (str, dict):
            return True
        if type(obj) in (_Namespace, LoopContext):
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_NAMES:
            # No attribute, so it is a key.
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind in (str, dict) and attribute in _HARMLESS:
            return getattr(obj, attribute)
        if kind is _Namespace and attribute[0] != "_":
            held = object.__getattribute__(obj, "_Namespace__attrs")
            return held[attribute] if attribute in held else super().getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        kind = type(called)
        is_plain = kind is BuiltinMethodType and type(called.__self__) in (str, dict)
        if not is_plain and kind is not Macro and called is not _Namespace:
            return super().call(context, called, *args, **kwargs)
        # `getattr` gave the method out, or the template made the macro: they are safe to call, and
        # only a macro wants something of the context.
        kwargs.pop("_block_vars", None)
        kwargs.pop("_loop_vars", None)
        if kind is Macro:
            return called(context.eval_ctx, *args, **kwargs)
        return called(*args, **kwargs)


@jinja2.pass_eval_context
def _as_it_is(_context: jinja2.nodes.EvalContext, value: Any) -> Any:
    return value


def _environment() -> _Environment:
    # Jinja would already work out 'a' * 10**10 while it compiles, where nothing limits it: it does
    # so when it optimises, and for output that it need not finish at run time.
    environment = _Environment(
        optimized=False,
        finalize=_as_it_is,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop what computes inside for `seconds`, where the system can; workers are also watched."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise RenderingLimit(f"rendering takes longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextlib.contextmanager
def _memory_limit(size_bytes: int | None) -> Iterator[None]:
    """Fail what takes more than `size_bytes` of memory inside, where the system can."""
    if size_bytes is None or sys.platform != "linux":
        yield
        return
    import resource

    before, hardest = resource.getrlimit(resource.RLIMIT_AS)
    limit = _own_pages() * resource.getpagesize() + size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hardest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hardest))


def _own_pages() -> int:
    """Pages that this process has mapped."""
    # Once or twice a row: without the layers of a file object.
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0])
    finally:
        os.close(file)
