"""`eightgig chat`: lines from the terminal, answers as they are made."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, suppress

from eightgig.chat import Conversation, obey
from eightgig.cli import render
from eightgig.errors import EightgigError
from eightgig.training.signals import catch_stop_signals

_TOGGLE_KEY = r'"\C-t": "\C-a\C-k/toggle\C-m"'


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
    _bind_toggle()
    render.show_note("Ask; Ctrl-T changes between base and tuned, /help lists the commands.")
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


def _show_answer(pieces: Generator[str]) -> None:
    """Pieces as they come; the first Ctrl-C ends the answer, not the conversation."""
    with catch_stop_signals() as stop, closing(pieces):
        for piece in pieces:
            render.show_piece(piece)
            if stop.is_requested:
                break
    render.show_line("")


def _bind_toggle() -> None:
    with suppress(ImportError):  # Windows has no readline; the command does the same
        import readline

        readline.parse_and_bind(_TOGGLE_KEY)


def _read_line(conversation: Conversation) -> str | None:
    try:
        return input("tuned> " if conversation.has_adapter else "base> ").strip()
    except EOFError:
        return None
