"""Rows as tokens: the model's own template, and which tokens are trained.

A row is laid out so that the prompt a server would build for an answer (`add_generation_prompt`)
is, token for token, the beginning of the row that trains it. The trained tokens are what follows,
up to and including the control token that ends the turn. Where a template renders an answer
differently once it is history, that answer gets a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eightgig.data.control import ControlTokenLost, ControlTokens, Encoded, RenderedText
from eightgig.data.formats import Example
from eightgig.data.rules import Notes
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.data.tokenizer import RenderSettings
from eightgig.data.turns import REASONING_KEYS, Message, texts_of

TrainOn = Literal["assistant", "last_assistant", "all"]

# The large Gemma 4 models open an answer without thinking with an empty thought. Their template
# writes it into the prompt but not into finished turns; Google advises to add it to training rows
# without thinking (ai.google.dev, Gemma 4 prompt formatting).
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


_REASONING_TAGS = ("<think>", "<thinking>", "<reasoning>", "<thought>")


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row to train on.

    Attributes:
        input_ids: Token ids, (T,), int32.
        is_trained: Which of them are trained, (T,), bool.
    """

    input_ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One trained turn: the prompt a server builds for it, and the text with it answered."""

    prompt: RenderedText
    full: RenderedText
    end: int
    """Behind the control token that ends the turn, as a position in `full`."""


class Renderer:
    """Renders rows for one model.

    Args:
        settings: Tokenizer and template, from `render_settings`.
        memory_bytes: What rendering one row may take beyond what the process has.

    Raises:
        DataError: The template is no valid Jinja.
    """

    def __init__(self, settings: RenderSettings, *, memory_bytes: int | None = None) -> None:
        self._settings = settings
        source = settings.chat_template
        self._template = (
            None
            if source is None
            else ChatTemplate(source, settings.special_tokens, memory_bytes=memory_bytes)
        )
        self.control = ControlTokens(settings.tokenizer_json, source or "")
        self._tails: dict[str, tuple[int, ...]] = {}
        self._takes_parts: bool | None = None

    def render(
        self, example: Example, notes: Notes, *, train_on: TrainOn = "assistant"
    ) -> tuple[RenderedRow, ...]:
        """The rows that train `example`, in order; none, and an error in `notes`, if impossible."""
        try:
            if example.text is not None:
                return self._render_text(example.text, notes)
            if self._settings.is_plain and example.prompt_completion is not None:
                return self._render_plain(*example.prompt_completion, notes, train_on)
            if self._template is None:
                notes.add("data.no_template", "The model has no chat template.")
                return ()
            rows = self._render_turns(self._template, example, notes, train_on)
            self._check_beginnings(rows, notes)
            return rows
        except TemplateRefused as error:
            self._note_refusal(example, str(error), notes)
        except RenderingLimit as error:
            notes.add("data.rendering_limit", f"The row cannot be rendered: {error}.")
        except ControlTokenLost as error:
            notes.add("data.control_token_lost", f"The row holds {error}.")
        return ()

    def _note_refusal(self, example: Example, reason: str, notes: Notes) -> None:
        first = example.messages[0]["role"] if example.messages else ""
        is_system = first in ("system", "developer") and (
            "system" in reason.lower() or "role" in reason.lower()
        )
        code = "data.system_unsupported" if is_system else "data.template_refused"
        notes.add(code, f"The chat template says: {reason.rstrip('.')[:200]}.")

    def _note_tags(self, example: Example, answers: list[_Answer], notes: Notes) -> None:
        """Note control tokens and foreign tags that somebody typed."""
        if any(answer.full.typed for answer in answers):
            for number, message in enumerate(example.messages, start=1):
                found = next(
                    filter(None, map(self.control.pattern.search, texts_of(message))), None
                )
                if found is not None:
                    turn = f"Turn {number} ({message['role']})"
                    notes.add("data.control_token", f"{turn} holds {found.group()}.")
                    break
            else:
                notes.add("data.control_token", "The row holds the name of a control token.")
        for index in example.trained:
            texts = texts_of(example.messages[index])
            tag = next((t for t in _REASONING_TAGS if any(t in text for text in texts)), None)
            if tag is not None and tag not in self.control.ids:
                notes.add("data.reasoning_tags", f"Turn {index + 1} holds {tag}.")
                return

    def _check_beginnings(self, rows: tuple[RenderedRow, ...], notes: Notes) -> None:
        bos = self.control.ids.get(str(self._settings.special_tokens.get("bos_token")))
        if any(row.input_ids[:2].tolist() == [bos, bos] for row in rows):
            notes.add("data.double_bos", "The row begins with two beginning-of-text tokens.")

    # Conversations

    def _render_turns(
        self, template: ChatTemplate, example: Example, notes: Notes, train_on: TrainOn
    ) -> tuple[RenderedRow, ...]:
        trained = example.trained if train_on == "assistant" else example.trained[-1:]
        if example.prompt_completion is not None:
            self._note_prerendered(example.prompt_completion[0], "The prompt", notes)
        answers = [self._answer(template, example, index, notes) for index in trained]
        self._note_tags(example, [a for a in answers if a is not None], notes)
        if notes.has_error or any(answer is None for answer in answers):
            return ()
        *earlier, last = [answer for answer in answers if answer is not None]
        encoded = self._encode(last.full)
        is_whole = self._splits_at(last.prompt, encoded) is not None
        inside = [a for a in earlier if is_whole and self._lies_in(a, last, encoded)]
        rows = [
            self._assemble([answer], self._encode(answer.full))
            for answer in earlier
            if answer not in inside
        ]
        rows.append(self._assemble([*inside, last], encoded, whole=train_on == "all"))
        if len(rows) > 1:
            count = f"{len(answers)} answers are trained in {len(rows)} rows."
            notes.add("data.split_per_turn", f"The row's {count}")
        return tuple(rows)

    def _text(
        self,
        template: ChatTemplate,
        messages: tuple[Message, ...],
        example: Example,
        *,
        prompt: bool,
        thinking: bool,
    ) -> RenderedText:
        return self.control.render(
            lambda turns, tools: template.render(
                turns, tools, add_generation_prompt=prompt, thinking=thinking
            ),
            messages,
            example.tools,
        )

    def _answer(
        self, template: ChatTemplate, example: Example, index: int, notes: Notes
    ) -> _Answer | None:
        messages = self._joined(template, example.messages[: index + 1])
        thinking = bool(_reasoning(messages[-1]))
        prompt = self._text(template, messages[:-1], example, prompt=True, thinking=thinking)
        full = self._text(template, messages, example, prompt=False, thinking=thinking)
        turn = f"turn {index + 1}"
        completion = self._completion(prompt, full)
        if completion is None:
            message = f"The prompt of {turn} is not the beginning of the rendered row."
            notes.add("data.served_prompt", message)
            return None
        full = prompt + completion
        ends = [m.end() for m in self.control.real_in(full) if m.end() > len(prompt.text)]
        if not ends or full.text[ends[-1] :].strip():
            notes.add("data.no_end_of_turn", f"No control token ends {turn}.")
            return None
        answer = _Answer(prompt, full, ends[-1])
        self._check_kept(messages, example.tools, answer, turn, notes)
        closing = self.control.real_in(full)[-1].group()
        if any(text.endswith(closing) for text in _texts(messages[-1])):
            notes.add("data.doubled_end", f"The text of {turn} ends with {closing}.")
        return answer

    def _completion(self, prompt: RenderedText, full: RenderedText) -> RenderedText | None:
        """What follows `prompt` when the turn it opens is finished as in `full`; None if unknown."""
        if full.text.startswith(prompt.text):
            return full.part(len(prompt.text))
        short = prompt.text.removesuffix(EMPTY_THOUGHT)
        if short != prompt.text:
            return full.part(len(short)) if full.text.startswith(short) else None
        # Some templates write what goes before differently in a prompt (Mistral puts the system
        # text before the last question only): the answer is what follows the opening of its turn.
        real = self.control.real_in(prompt)
        opening = prompt.text[real[-1].start() :] if real else ""
        starts = [match.start() for match in self.control.real_in(full) if opening]
        last = next((s for s in reversed(starts) if full.text.startswith(opening, s)), None)
        return None if last is None else full.part(last + len(opening))

    def _joined(self, template: ChatTemplate, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """`messages` with text parts joined, where the template takes text only."""
        if not any(isinstance(message["content"], list) for message in messages):
            return messages
        if self._takes_parts is None:
            self._takes_parts = _takes_parts(template)
        if self._takes_parts:
            return messages
        return tuple(
            {**message, "content": "\n".join(part["text"] for part in message["content"])}
            if isinstance(message["content"], list)
            else message
            for message in messages
        )

    def _check_kept(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Mapping[str, Any], ...],
        answer: _Answer,
        turn: str,
        notes: Notes,
    ) -> None:
        """Whether all that is written in the row is in the text."""
        reasoning = _reasoning(messages[-1])
        completion = answer.full.text[len(answer.prompt.text) : answer.end]
        if reasoning.strip() not in completion:
            notes.add("data.reasoning_lost", f"The reasoning of {turn} is not rendered.")
        for piece in self._pieces(messages[-1]):
            if piece not in completion:
                notes.add("data.content_lost", f"Text of {turn} is not rendered: {_quote(piece)}.")
                break
        for call in messages[-1].get("tool_calls", ()):
            if call["function"]["name"] not in completion:
                notes.add("data.content_lost", f"The tool call of {turn} is not rendered.")
        for tool in tools:
            if tool["function"]["name"] not in answer.prompt.text:
                name = tool["function"]["name"]
                notes.add("data.tools_lost", f'The tool "{name}" is not rendered.')
                break
        for number, message in enumerate(messages[:-1], start=1):
            if message["role"] in ("assistant", "tool"):
                continue
            lost = next((p for p in _texts(message) if p not in answer.prompt.text), None)
            if lost is not None:
                text = f"Text of turn {number} ({message['role']}) is not rendered: {_quote(lost)}."
                notes.add("data.content_lost", text)

    def _pieces(self, message: Message) -> list[str]:
        """Texts of an answer between the names of control tokens, which templates may move."""
        return [
            piece.strip()
            for text in _texts(message)
            for piece in self.control.pattern.split(text)
            if piece.strip()
        ]

    def _lies_in(self, answer: _Answer, last: _Answer, encoded: Encoded) -> bool:
        """Whether `last`'s row trains `answer` behind the prompt that a server would send."""
        text, start = last.full.text, len(answer.prompt.text)
        return (
            text.startswith(answer.prompt.text)
            and text[start : answer.end] == answer.full.text[start : answer.end]
            and self._splits_at(answer.prompt, encoded) is not None
        )

    # Tokens

    def _encode(self, rendered: RenderedText) -> Encoded:
        return self.control.encode(rendered)

    def _splits_at(self, prompt: RenderedText, row: Encoded) -> int | None:
        """Tokens of `prompt` if `row`, whose text begins with it, begins with its tokens."""
        length = len(prompt.text)
        real = self.control.real_in(prompt)
        start = real[-1].end() if real else 0
        count = row.token_at(length)
        if count is None:
            return None
        # Control tokens cut a text into pieces that are tokenised apart, so that all tokens up to
        # the last one agree when the texts do; only what follows it can join with the answer.
        first = 0 if start == 0 else row.token_at(real[-1].start())
        if first is None:
            return None
        tail = self._tail_ids(prompt, real[-1].start() if real else 0)
        return count if row.ids[first:count] == tail else None

    def _tail_ids(self, prompt: RenderedText, start: int) -> tuple[int, ...]:
        """Tokens of `prompt` from its last control token on."""
        tail = prompt.part(start)
        if tail.typed or len(tail.text) > 200:
            return self._encode(tail).ids
        if tail.text not in self._tails:
            self._tails[tail.text] = self._encode(tail).ids
        return self._tails[tail.text]

    def _assemble(
        self, answers: list[_Answer], encoded: Encoded, *, whole: bool = False
    ) -> RenderedRow:
        """The row of the last of `answers`, tokenised as `encoded`, with all of them trained."""
        if self._splits_at(answers[-1].prompt, encoded) is None:
            return self._compose(answers[-1], whole=whole)
        ids = np.array(encoded.ids, np.int32)
        is_trained = np.zeros(len(ids), np.bool_)
        for answer in answers:
            start = encoded.token_at(len(answer.prompt.text))
            end = encoded.token_at(answer.end)
            is_trained[start : len(ids) if end is None else end] = True
        return _finish(ids, is_trained, whole=whole)

    def _compose(self, answer: _Answer, *, whole: bool) -> RenderedRow:
        """Prompt and answer tokenised apart: a token would reach from one into the other."""
        prompt = self._encode(answer.prompt).ids
        start, end = len(answer.prompt.text), answer.end
        # Behind a control token, so that a tokenizer adds no blank as at the start of a text.
        last = self.control.real_in(answer.full.part(0, end))[-1]
        lead = RenderedText(last.group())
        trained = self._encode(lead + answer.full.part(start, end)).ids[1:]
        rest = self._encode(lead + answer.full.part(end)).ids[1:]
        ids = np.array([*prompt, *trained, *rest], np.int32)
        is_trained = np.zeros(len(ids), np.bool_)
        is_trained[len(prompt) : len(prompt) + len(trained)] = True
        return _finish(ids, is_trained, whole=whole)

    # Rows without turns

    def _render_text(self, text: str, notes: Notes) -> tuple[RenderedRow, ...]:
        """Plain text: beginning token if the model has one, every token trained, and its end."""
        if self._note_prerendered(text, "The text", notes):
            return ()
        rendered = RenderedText(text, self.control.typed_in(text))
        if rendered.typed:
            found = self.control.pattern.search(text)
            assert found is not None, "a control token was found before"
            notes.add("data.control_token", f"The text holds {found.group()}.")
        ids = np.array([*self._bos(), *self._encode(rendered).ids, *self._eos()], np.int32)
        is_trained = np.ones(len(ids), np.bool_)
        is_trained[: len(self._bos())] = False
        return (RenderedRow(ids, is_trained),)

    def _render_plain(
        self, prompt: str, completion: str, notes: Notes, train_on: TrainOn
    ) -> tuple[RenderedRow, ...]:
        """Prompt and completion one behind the other, without a template."""
        if self._note_prerendered(prompt, "The prompt", notes):
            return ()
        before = RenderedText(prompt, self.control.typed_in(prompt))
        whole = prompt + completion
        full = self._encode(RenderedText(whole, self.control.typed_in(whole)))
        start = self._encode(before).ids
        if full.ids[: len(start)] == start:
            rest = full.ids[len(start) :]
        else:
            rest = self._encode(RenderedText(completion, self.control.typed_in(completion))).ids
        bos = self._bos()
        ids = np.array([*bos, *start, *rest, *self._eos()], np.int32)
        is_trained = np.ones(len(ids), np.bool_)
        is_trained[: len(bos) + (0 if train_on == "all" else len(start))] = False
        return (RenderedRow(ids, is_trained),)

    def _bos(self) -> tuple[int, ...]:
        return () if self._settings.bos_id is None else (self._settings.bos_id,)

    def _eos(self) -> tuple[int, ...]:
        return () if self._settings.eos_id is None else (self._settings.eos_id,)

    def _note_prerendered(self, text: str, name: str, notes: Notes) -> bool:
        first = self.control.pattern.match(text.lstrip())
        if first is None:
            return False
        notes.add("data.prerendered", f"{name} begins with the control token {first.group()}.")
        return True


def _finish(ids: NDArray[np.int32], is_trained: NDArray[np.bool_], *, whole: bool) -> RenderedRow:
    if whole:
        is_trained[:] = True
        is_trained[0] = False
    return RenderedRow(ids, is_trained)


def _reasoning(message: Message) -> str:
    return next((str(message[key]) for key in REASONING_KEYS if key in message), "")


def _texts(message: Message) -> list[str]:
    return [text.strip() for text in texts_of(message) if text.strip()]


def _quote(text: str) -> str:
    short = " ".join(text.split())
    return f'"{short[:60]}..."' if len(short) > 60 else f'"{short}"'


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether the template renders a list of text parts as their texts."""
    parts = [{"type": "text", "text": "first part"}, {"type": "text", "text": "second part"}]
    turns: list[Message] = [{"role": "user", "content": parts}]
    try:
        text = template.render(turns, (), add_generation_prompt=True)
    except (TemplateRefused, RenderingLimit):
        return False
    return "first part" in text and "second part" in text and "'text'" not in text
