"""The first signal asks, the second stops; afterwards everything is as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from eightgig.training.signals import StopRequest, catch_stop_signals

_CHILD = """
import time
from eightgig.training.signals import catch_stop_signals

with catch_stop_signals() as stop:
    print("ready", flush=True)
    while not stop.is_requested:
        time.sleep(0.005)
    print(stop.signal_name, flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    with catch_stop_signals() as stop:
        assert not stop.is_requested
        signal.raise_signal(number)
        assert stop.is_requested
        assert stop.signal_name == number.name


def test_handlers_are_put_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="inside"), catch_stop_signals():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_echo_of_the_first_is_not_a_second() -> None:
    stop = StopRequest()
    for _ in range(3):
        stop.handle(signal.SIGINT, None)
    assert stop.is_requested


def test_outside_the_main_thread_nothing_is_caught() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with catch_stop_signals() as stop:
            seen.append((stop.is_requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.skipif(os.name == "nt", reason="sends signals to a child")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.readline() == f"{number.name}\n"
        time.sleep(0.3)
        child.send_signal(number)
        assert child.wait(timeout=10) == -number


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_hang_up_is_caught_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_requested
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with catch_stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal_name == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)
