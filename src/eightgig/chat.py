"""A conversation with a tuned run: its template, its stops, its adapter on or off, streaming.

Prompts are built as the training rendered its rows, so that the model sees in a chat what it was
trained on. Nothing is drawn here: `ask` yields pieces of text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from eightgig.data.control import ControlTokens, RenderedText
from eightgig.data.encode import ControlTokenLost
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.engine.assemble import Engine
from eightgig.engine.generate import Sampling, generate, row_bytes
from eightgig.errors import DataError, DoesNotFitError
from eightgig.evaluation.tuned_run import (
    TunedRun,
    answer_bytes,
    build_engine,
    open_run,
    plan_conversation,
    with_room,
)
from eightgig.memory.plan import Plan
from eightgig.units import format_bytes

MAX_ANSWER_TOKENS = 1024
COMMANDS: Mapping[str, str] = {
    "/base": "answer with the base model",
    "/tuned": "answer with the adapter",
    "/toggle": "change between the two",
    "/system TEXT": "begin anew with this system turn; without TEXT with none",
    "/reset": "forget the conversation",
    "/help": "show this list",
    "/quit": "end",
}

_USED_SETTINGS = ("temperature", "top_k", "top_p")
# What these are where nobody set them, or where they do nothing.
_NEUTRAL_SETTINGS = {
    "repetition_penalty": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """How answers are made; None takes what the model's generation_config.json says.

    Attributes:
        temperature: 0 takes the likeliest token.
        max_new_tokens: Of one answer.
        seed: Of the draws.
        system: System turn.
        has_adapter: Whether the adapter is on at first.
    """

    temperature: float | None = None
    max_new_tokens: int = MAX_ANSWER_TOKENS
    seed: int = 0
    system: str | None = None
    has_adapter: bool = True


class Conversation:
    """Turns so far, and the model that answers.

    Args:
        tuned: The run.
        engine: Its engine.
        plan: What the engine was built for.
        options: How answers are made.

    Attributes:
        system: The system turn, None for none.
        notes: Settings of the model that are not used, in words.
    """

    def __init__(self, tuned: TunedRun, engine: Engine, plan: Plan, options: ChatOptions) -> None:
        settings = tuned.settings
        self._tuned = tuned
        self._engine = engine
        self._plan = plan
        self._options = options
        self._sampling, self.notes = default_sampling(tuned.base.folder, options)
        source = settings.chat_template
        self._template = None if source is None else ChatTemplate(source, settings.special_tokens)
        self._control = ControlTokens(settings.tokenizer_json, source or "")
        self._turns: list[dict[str, str]] = []
        self._has_adapter = options.has_adapter
        self.system = options.system

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter answers."""
        return self._has_adapter

    def use_adapter(self, has_adapter: bool) -> None:
        """Let the tuned or the base model answer from now on; the turns so far stay."""
        self._has_adapter = has_adapter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def reset(self) -> None:
        """Forget all turns but the system turn."""
        self._turns.clear()

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of the conversation with `text` as its last turn, the answer's turn opened.

        Raises:
            DataError: The template or the tokenizer does not take this conversation, or it is no
                text.
        """
        _require_text(self.system or "", text)
        try:
            if self._template is None:
                return self._plain_ids(text)
            return self._turn_ids(self._template, text)
        except (TemplateRefused, RenderingLimit, ControlTokenLost) as error:
            raise DataError(
                "The chat template or the tokenizer does not take this conversation.",
                why=f"It says: {str(error).rstrip('.')}.",
                fix="Leave out the system turn, write it otherwise, or begin anew with /reset.",
            ) from error

    def ask(self, text: str) -> Generator[str]:
        """Pieces of the answer to `text`, as they are made; then both are part of the turns.

        The answer may be left before its end, between two pieces.

        Raises:
            DataError: The template does not take this conversation, or it is too long.
            DoesNotFitError: The memory does not suffice for this length.
        """
        prompt = self.prompt_ids(text)
        most = self._check_length(len(prompt))
        self._engine.model.use_adapter(self._has_adapter)
        steps = generate(
            self._engine.model,
            self._engine.ops,
            [prompt],
            max_new_tokens=most,
            stop_ids=self._tuned.stop_ids,
            sampling=replace(self._sampling, seed=self._options.seed + len(self._turns)),
        )
        pieces = TextPieces(lambda ids: str(self._tuned.tokenizer.decode(ids)))
        try:
            for tokens in steps:
                token = tokens[0]
                if token is not None and token not in self._tuned.stop_ids:
                    yield from pieces.add(token)
            yield from pieces.finish()
        except GeneratorExit:  # left early: what was said so far has been said
            self._remember(text, pieces.text)
            raise
        self._remember(text, pieces.text)

    def _remember(self, text: str, answer: str) -> None:
        turns = (("user", text), ("assistant", answer))
        self._turns += [{"role": role, "content": content} for role, content in turns]

    def _turn_ids(self, template: ChatTemplate, text: str) -> tuple[int, ...]:
        """The turns so far and `text` as the next of the user, as `template` renders them."""
        turns = [*self._turns, {"role": "user", "content": text}]
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        rendered = self._control.render(
            lambda some, tools: template.render(some, tools, add_generation_prompt=True),
            turns,
            (),
        )
        return self._control.encode(rendered).ids

    def _plain_ids(self, text: str) -> tuple[int, ...]:
        """A prompt without a template, as `data.chat_template: none` trains it; it has no turns."""
        rendered = RenderedText(text, self._control.typed_in(text))
        bos = self._tuned.settings.bos_id
        start = () if bos is None else (bos,)
        return (*start, *self._control.encode(rendered).ids)

    def _check_length(self, prompt_tokens: int) -> int:
        """Tokens that the answer may have."""
        decoder = self._tuned.base.spec.decoder
        longest = min(self._plan.max_length, decoder.max_positions - 1)
        if prompt_tokens > longest:
            raise DataError(
                f"The conversation has {prompt_tokens:,} tokens; {longest:,} are planned for.",
                why="All of it passes the model for every answer.",
                fix="Begin anew with /reset, or start with --set memory.budget or a larger "
                "data.max_length in the run's config.",
            )
        most = min(self._options.max_new_tokens, decoder.max_positions - prompt_tokens)
        item_bytes = self._engine.model.dtype.itemsize
        needed = row_bytes(decoder, prompt_tokens, most, item_bytes)
        free = answer_bytes(self._plan)
        if needed > free:
            raise DoesNotFitError(
                f"The answer needs {format_bytes(needed)}; {format_bytes(max(0, free))} are free.",
                why="Keys and values of every token are kept while an answer is made.",
                fix="Begin anew with /reset, or ask for shorter answers with --max-tokens.",
            )
        return most


def _require_text(*parts: str) -> None:
    try:
        "".join(parts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "The text is not UTF-8.",
            why="It holds bytes that are no characters.",
            fix="Write it again; if this comes again, set terminal or file to UTF-8.",
        ) from error


class TextPieces:
    """Text of tokens that come one by one; a character is held back until it is whole.

    Args:
        decode: Tokens to text.

    Attributes:
        text: All of it so far.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0
        self.text = ""

    def add(self, token: int) -> Iterator[str]:
        """What `token` adds; nothing while a character is not whole."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):
            yield from self._show(text)

    def finish(self) -> Iterator[str]:
        """What was held back."""
        yield from self._show(self._decode(self._ids))

    def _show(self, text: str) -> Iterator[str]:
        self.text = text
        piece, self._shown = text[self._shown :], len(text)
        if piece:
            yield piece


def open_conversation(
    folder: Path,
    options: ChatOptions,
    observe: Callable[[object], None],
    *,
    overrides: Sequence[str] = (),
) -> Conversation:
    """A conversation with the run in `folder`; leaving it as a context gives the memory back.

    Raises:
        EightgigError: The run has not ended, does not fit this machine, or is damaged.
    """
    tuned = open_run(folder, observe, overrides=overrides)
    plan = plan_conversation(tuned)
    plan = with_room(plan, tuned, plan.max_length, options.max_new_tokens, num_rows=1)
    return Conversation(tuned, build_engine(tuned, plan, observe), plan, options)


def default_sampling(folder: Path, options: ChatOptions) -> tuple[Sampling, tuple[str, ...]]:
    """How the model in `folder` wants its tokens drawn, and what of that is not used.

    Without `do_sample` the likeliest token is taken, as in Transformers.
    """
    values = _generation_config(folder)
    ignored = tuple(
        f"{name} of generation_config.json is not used"
        for name, neutral in _NEUTRAL_SETTINGS.items()
        if values.get(name) not in neutral
    )
    numbers = {name: _number(values.get(name)) for name in _USED_SETTINGS}
    temperature = options.temperature
    if temperature is None:
        drawn = 1.0 if numbers["temperature"] is None else numbers["temperature"]
        temperature = drawn if values.get("do_sample") is True else 0.0
    # Transformers draws from the likeliest 50 where the file says nothing.
    top_k = 50 if numbers["top_k"] is None else int(numbers["top_k"])
    top_p = 1.0 if numbers["top_p"] is None else numbers["top_p"]
    sampling = Sampling(
        temperature=max(0.0, temperature), top_k=max(0, top_k), top_p=top_p, seed=options.seed
    )
    return sampling, ignored


def obey(conversation: Conversation, line: str) -> str | None:
    """Carry out a command of `COMMANDS`; what to say then, None for `/quit`.

    Unknown commands change nothing.
    """
    command, _, text = line.strip().partition(" ")
    if command == "/quit":
        return None
    if command in ("/base", "/tuned", "/toggle"):
        wanted = not conversation.has_adapter if command == "/toggle" else command == "/tuned"
        conversation.use_adapter(wanted)
        return "The tuned model answers." if wanted else "The base model answers."
    if command == "/system":
        conversation.reset()
        conversation.system = text.strip() or None
        return "A new conversation with this system turn." if text.strip() else "No system turn."
    if command == "/reset":
        conversation.reset()
        return "A new conversation."
    lines = [] if command == "/help" else [f"{command} is no command. These are:"]
    width = max(map(len, COMMANDS))
    return "\n".join([*lines, *(f"{name:<{width}}  {what}" for name, what in COMMANDS.items())])


def _generation_config(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None
