"""The console that everything is drawn on: control codes of others do not reach the terminal, and
nobody has to be there to read.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from eightgig.errors import EightgigError

_LOGGER = logging.getLogger(__name__)
_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class SafeConsole(Console):
    """Rich's console, for texts of others and for streams that may be gone or full.

    Args:
        stderr: Draw on standard error.
        width: In columns; None asks the terminal.
        is_needed: What is drawn is the result of the command, which has failed where it cannot be
            written. The course of a work is not: it goes on when its terminal is closed.
    """

    def __init__(
        self, *, stderr: bool = False, width: int | None = None, is_needed: bool = False
    ) -> None:
        file = open_output(stderr=stderr, is_needed=is_needed)
        super().__init__(file=file, stderr=stderr, width=width)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Segments of `renderable`; the console's own control codes are segments of their own."""
        for segment in super().render(renderable, options):
            if segment.control is None and _CONTROL_CODES.search(segment.text):
                yield Segment(without_control_codes(segment.text), segment.style)
            else:
                yield segment


def without_control_codes(text: str) -> str:
    """`text` that does nothing to a terminal."""
    return _CONTROL_CODES.sub("\ufffd", text)


def open_output(*, stderr: bool = False, is_needed: bool = True) -> IO[str] | None:
    """Standard output or error to write to, None where the process has none.

    Args:
        stderr: Standard error.
        is_needed: A BrokenPipeError, and an EightgigError for all other trouble, is raised where
            it cannot be written; otherwise what is written then goes nowhere.
    """
    stream = sys.stderr if stderr else sys.stdout
    return None if stream is None else cast("IO[str]", _Output(stream, is_needed=is_needed))


class _Output:
    """A stream, and what becomes of what it does not take."""

    def __init__(self, stream: IO[str], *, is_needed: bool) -> None:
        self._stream = stream
        self._is_needed = is_needed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, if anybody takes it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _silence(self._stream)
        if not self._is_needed:
            _LOGGER.warning("Nothing more can be shown: %s.", error.strerror)
        elif isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise error
        else:
            raise EightgigError(
                f"The result cannot be written: {error.strerror}.",
                why="Standard output does not take it.",
                fix="See where it is redirected to, and whether there is space.",
            ) from error


def _silence(stream: IO[str]) -> None:
    """Let `stream` end nowhere: what it still holds would fail again when Python exits."""
    with suppress(OSError, ValueError):  # one that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
