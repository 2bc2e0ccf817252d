"""How long the compute stream waits for copies."""

from __future__ import annotations

from collections.abc import Callable

import torch


class WaitMeter:
    """Times the waits of the compute stream; off until `start`, and free of cost while off."""

    def __init__(self) -> None:
        self._is_on = False
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Time the waits from now on."""
        self._is_on = True
        self._waits.clear()

    def wait(self, wait: Callable[[], None]) -> None:
        """Call `wait`, which orders the compute stream behind a copy."""
        if not self._is_on:
            wait()
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        before.record()
        wait()
        after.record()
        self._waits.append((before, after))

    def take_seconds(self) -> float:
        """Seconds waited since the last call; blocks until the last wait is over."""
        if self._waits:
            self._waits[-1][1].synchronize()
        milliseconds: float = sum(before.elapsed_time(after) for before, after in self._waits)
        self._waits.clear()
        return milliseconds / 1000
