"""Rows as tokens: the model's own template, and which tokens are trained.

A row is laid out so that the prompt a server would build for an answer (`add_generation_prompt`)
is, token for token, the beginning of the row that trains it. The trained tokens are what follows,
up to and including the control token that ends the turn. Where a template renders an answer
differently once it is history, that answer gets a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from eightgig.data.control import ControlTokens, RenderedText
from eightgig.data.encode import ControlTokenLost
from eightgig.data.formats import Example
from eightgig.data.layout import RenderedRow, RowLayout
from eightgig.data.rules import Notes
from eightgig.data.served import Answer, AnswerReader
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.data.tokenizer import RenderSettings
from eightgig.data.turns import texts_of

TrainOn = Literal["assistant", "last_assistant", "all"]

_REASONING_TAGS = ("<think>", "<thinking>", "<reasoning>", "<thought>")


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
        self.control = ControlTokens(settings.tokenizer_json, source or "")
        self._layout = RowLayout(self.control)
        self._answers: AnswerReader | None = None
        if source is not None:
            template = ChatTemplate(source, settings.special_tokens, memory_bytes=memory_bytes)
            self._answers = AnswerReader(template, self.control)

    def render(
        self, example: Example, notes: Notes, *, train_on: TrainOn = "assistant"
    ) -> tuple[RenderedRow, ...]:
        """The rows that train `example`, in order; none, and an error in `notes`, if impossible."""
        try:
            if example.text is not None:
                return self._render_text(example.text, notes)
            if self._settings.is_plain and example.prompt_completion is not None:
                return self._render_plain(*example.prompt_completion, notes, train_on)
            if self._answers is None:
                notes.add("data.no_template", "The model has no chat template.")
                return ()
            rows = self._render_turns(self._answers, example, notes, train_on)
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

    def _note_tags(self, example: Example, answers: Sequence[Answer], notes: Notes) -> None:
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

    def _render_turns(
        self, reader: AnswerReader, example: Example, notes: Notes, train_on: TrainOn
    ) -> tuple[RenderedRow, ...]:
        trained = example.trained if train_on == "assistant" else example.trained[-1:]
        if example.prompt_completion is not None:
            self._note_prerendered(example.prompt_completion[0], "The prompt", notes)
        found = [reader.read(example, index, notes) for index in trained]
        answers = [answer for answer in found if answer is not None]
        self._note_tags(example, answers, notes)
        if notes.has_error or len(answers) < len(found):
            return ()
        rows = self._layout.lay_out(answers, is_whole=train_on == "all")
        if len(rows) > 1:
            message = f"The row's {len(answers)} answers are trained in {len(rows)} rows."
            notes.add("data.split_per_turn", message)
        return rows

    def _render_text(self, text: str, notes: Notes) -> tuple[RenderedRow, ...]:
        """Plain text: beginning token if the model has one, every token trained, and its end."""
        if self._note_prerendered(text, "The text", notes):
            return ()
        rendered = RenderedText(text, self.control.typed_in(text))
        if rendered.typed:
            found = self.control.pattern.search(text)
            assert found is not None, "a control token was found before"
            notes.add("data.control_token", f"The text holds {found.group()}.")
        ids = np.array([*self._bos(), *self.control.encode(rendered).ids, *self._eos()], np.int32)
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
        full = self.control.encode(RenderedText(whole, self.control.typed_in(whole)))
        start = self.control.encode(before).ids
        if full.ids[: len(start)] == start:
            rest = full.ids[len(start) :]
        else:
            rest = self.control.encode(
                RenderedText(completion, self.control.typed_in(completion))
            ).ids
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
