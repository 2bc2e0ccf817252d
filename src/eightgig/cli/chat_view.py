"""`eightgig chat`: lines from the terminal, answers as they are made."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator
from contextlib import closing, suppress

from eightgig.chat import Conversation, obey
from eightgig.cli import render
from eightgig.errors import DataError, DoesNotFitError, EightgigError
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
            except (DataError, DoesNotFitError) as error:  # too long, for example
                render.show_error(error)


def prepare_input() -> None:
    """Let any bytes come; refuse a conversation with nobody, before its model is loaded.

    Raises:
        EightgigError: The process has no standard input.
    """
    if sys.stdin is None:
        raise _no_input("it is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is pasted may be of another encoding; such a line is refused when it is asked.
        sys.stdin.reconfigure(errors="surrogateescape")


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
    prompt = "tuned> " if conversation.has_adapter else "base> "
    # `input` edits lines, and must know the prompt for it; of a disk that is full it knows nothing.
    is_edited = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if not is_edited:
        render.show_piece(prompt)
    try:
        line = input(prompt) + "\n" if is_edited else sys.stdin.readline()
    except EOFError:
        return None
    except OSError as error:
        raise _no_input(str(error.strerror)) from error
    return line.strip() if line else None


def _no_input(reason: str) -> EightgigError:
    return EightgigError(
        f"Standard input cannot be read: {reason}.",
        why="Questions are read from there, a line each.",
        fix="Start it in a terminal or redirect a file into it; --prompt asks one question.",
    )
