"""`eightgig chat`: lines from the terminal, answers as they are made."""

from __future__ import annotations

from collections.abc import Iterator

from eightgig.chat import Conversation, obey
from eightgig.cli import render
from eightgig.errors import EightgigError


def answer_once(conversation: Conversation, prompt: str, *, as_json: bool) -> None:
    """Answer `prompt`; with `as_json` as one JSON object when the answer is whole."""
    _show_notes(conversation)
    pieces = conversation.ask(prompt)
    if as_json:
        model = "tuned" if conversation.has_adapter else "base"
        render.show_json({"model": model, "question": prompt, "answer": "".join(pieces)})
    else:
        _show_answer(pieces)


def converse(conversation: Conversation) -> None:
    """Answer line after line until `/quit` or the end of input."""
    _show_notes(conversation)
    render.show_note("Ask; /help lists the commands, /quit ends.")
    while (line := _read_line(conversation)) is not None:
        if line.startswith("/"):
            said = obey(conversation, line)
            if said is None:
                return
            render.show_note(said)
        elif line:
            try:
                _show_answer(conversation.ask(line))
            except EightgigError as error:  # too long, for example: the conversation goes on
                render.show_error(error)


def _show_notes(conversation: Conversation) -> None:
    for note in conversation.notes:
        render.show_note(note)


def _show_answer(pieces: Iterator[str]) -> None:
    for piece in pieces:
        render.show_piece(piece)
    render.show_line("")


def _read_line(conversation: Conversation) -> str | None:
    try:
        return input("tuned> " if conversation.has_adapter else "base> ").strip()
    except EOFError:
        return None
