"""Ctrl-C and its kin: the first asks for a stop after the micro-batch, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# Wrappers (uv, npm, timeout) often pass on a signal that the terminal has sent already.
_ECHO_SECONDS = 0.1


class Interrupted(Exception):
    """Somebody asked the process to stop: what is under way is left as if it had not begun."""


class StopRequest:
    """Whether somebody asked the process to stop; the loop looks between micro-batches."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._first_seconds = 0.0

    @property
    def is_requested(self) -> bool:
        """Whether to save and stop."""
        return self.signal_name is not None

    def check(self) -> None:
        """Leave what is under way, where somebody asked for it.

        Raises:
            Interrupted: Somebody did.
        """
        if self.is_requested:
            raise Interrupted

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first signal, obey the second at once."""
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._first_seconds = time.monotonic()
        elif time.monotonic() - self._first_seconds > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            # Only where the system's own reaction is not to end the process.
            os._exit(128 + number)


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM, SIGHUP and Windows' Ctrl-Break into a request to stop.

    Handlers are put back on leaving. Outside the main thread, where Python allows no handlers, the
    request is never set. A hang-up that the caller chose to ignore (nohup) stays ignored.
    """
    request = StopRequest()
    with _handled_by(request.handle, _stop_signals()):
        yield request


@contextmanager
def stop_like_ctrl_c() -> Iterator[None]:
    """Let the other signals do what Ctrl-C does: KeyboardInterrupt, so that work is tidied up.

    By themselves they end the process at once. Threads and hang-ups as for `catch_stop_signals`.
    """
    others = [number for number in _stop_signals() if number != signal.SIGINT]
    with _handled_by(signal.default_int_handler, others):
        yield


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _stop_signals() -> list[signal.Signals]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            numbers.append(number)
    return numbers
