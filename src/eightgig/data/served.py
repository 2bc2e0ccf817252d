"""Answers of a conversation: the prompt that a server builds for each, and what is answered.

All of it is text still. What the template renders is compared with what the row says, so that
nothing is dropped on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.data.control import ControlTokens, RenderedText
from eightgig.data.formats import Example
from eightgig.data.rules import Notes
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.data.turns import REASONING_KEYS, Message, texts_of

# The large Gemma 4 models open an answer without thinking with an empty thought. Their template
# writes it into the prompt but not into finished turns; Google advises to add it to training rows
# without thinking (ai.google.dev, Gemma 4 prompt formatting).
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


@dataclass(frozen=True, slots=True)
class Answer:
    """One trained turn.

    Attributes:
        prompt: What a server builds for it.
        full: The prompt with its answer behind it.
        end: Behind the control token that ends the turn, as a position in `full`.
    """

    prompt: RenderedText
    full: RenderedText
    end: int


class AnswerReader:
    """Renders answers with one template.

    Args:
        template: The chat template.
        control: The control tokens of its tokenizer.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens) -> None:
        self._template = template
        self._control = control
        self._takes_parts: bool | None = None

    def read(self, example: Example, index: int, notes: Notes) -> Answer | None:
        """The answer in turn `index`; None, and an error in `notes`, if it has no prompt.

        Raises:
            TemplateRefused: The template does not take the conversation.
            RenderingLimit: It takes too long, or too much memory.
            ControlTokenLost: A typed control token cannot be kept apart.
        """
        messages = self._joined(example.messages[: index + 1])
        thinking = bool(_reasoning(messages[-1]))
        prompt = self._text(messages[:-1], example, prompt=True, thinking=thinking)
        finished = self._text(messages, example, prompt=False, thinking=thinking)
        completion = self._completion(prompt, finished)
        turn = f"turn {index + 1}"
        if completion is None:
            message = f"The prompt of {turn} is not the beginning of the rendered row."
            notes.add("data.served_prompt", message)
            return None
        full = prompt + completion
        closing = self._control.real_in(full)[-1:]
        end = closing[0].end() if closing else 0
        if end <= len(prompt.text) or full.text[end:].strip():
            notes.add("data.no_end_of_turn", f"No control token ends {turn}.")
            return None
        answer = Answer(prompt, full, end)
        self._check_answer(messages[-1], answer, turn, notes)
        self._check_prompt(messages[:-1], example.tools, prompt, notes)
        name = closing[0].group()
        if any(text.endswith(name) for text in _texts(messages[-1])):
            notes.add("data.doubled_end", f"The text of {turn} ends with {name}.")
        return answer

    def _text(
        self, messages: tuple[Message, ...], example: Example, *, prompt: bool, thinking: bool
    ) -> RenderedText:
        return self._control.render(
            lambda turns, tools: self._template.render(
                turns, tools, add_generation_prompt=prompt, thinking=thinking
            ),
            messages,
            example.tools,
        )

    def _completion(self, prompt: RenderedText, full: RenderedText) -> RenderedText | None:
        """What follows `prompt` when the turn it opens is finished as in `full`, if it is known."""
        if full.text.startswith(prompt.text):
            return full.part(len(prompt.text))
        short = prompt.text.removesuffix(EMPTY_THOUGHT)
        if short != prompt.text:
            return full.part(len(short)) if full.text.startswith(short) else None
        # Some templates write what goes before differently in a prompt (Mistral puts the system
        # text before the last question only): the answer is what follows the opening of its turn.
        real = self._control.real_in(prompt)
        opening = prompt.text[real[-1].start() :] if real else ""
        starts = [match.start() for match in self._control.real_in(full) if opening]
        last = next((s for s in reversed(starts) if full.text.startswith(opening, s)), None)
        return None if last is None else full.part(last + len(opening))

    def _joined(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """`messages` with text parts joined, where the template takes text only."""
        if not any(isinstance(message["content"], list) for message in messages):
            return messages
        if self._takes_parts is None:
            self._takes_parts = _takes_parts(self._template)
        if self._takes_parts:
            return messages
        return tuple(
            {**message, "content": "\n".join(texts_of(message))}
            if isinstance(message["content"], list)
            else message
            for message in messages
        )

    def _check_answer(self, message: Message, answer: Answer, turn: str, notes: Notes) -> None:
        """Note what the row answers and the text does not."""
        completion = answer.full.text[len(answer.prompt.text) : answer.end]
        if _reasoning(message).strip() not in completion:
            notes.add("data.reasoning_lost", f"The reasoning of {turn} is not rendered.")
        lost = next((piece for piece in self._pieces(message) if piece not in completion), None)
        if lost is not None:
            notes.add("data.content_lost", f"Text of {turn} is not rendered: {_quote(lost)}.")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in completion:
                notes.add("data.content_lost", f"The tool call of {turn} is not rendered.")

    def _check_prompt(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Mapping[str, Any], ...],
        prompt: RenderedText,
        notes: Notes,
    ) -> None:
        """Note what the row asks and the prompt does not."""
        names = [str(tool["function"]["name"]) for tool in tools]
        name = next((name for name in names if name not in prompt.text), None)
        if name is not None:
            notes.add("data.tools_lost", f'The tool "{name}" is not rendered.')
        for number, message in enumerate(messages, start=1):
            if message["role"] in ("assistant", "tool"):
                continue
            lost = next((text for text in _texts(message) if text not in prompt.text), None)
            if lost is not None:
                turn = f"turn {number} ({message['role']})"
                notes.add("data.content_lost", f"Text of {turn} is not rendered: {_quote(lost)}.")

    def _pieces(self, message: Message) -> list[str]:
        """Texts of an answer between the names of control tokens, which templates may move."""
        return [
            piece.strip()
            for text in _texts(message)
            for piece in self._control.pattern.split(text)
            if piece.strip()
        ]


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
