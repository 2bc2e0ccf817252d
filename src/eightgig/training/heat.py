"""A pause for a GPU that is too hot, where `run.pause_above_celsius` asks for one."""

from __future__ import annotations

import time
from collections.abc import Callable

from eightgig.errors import ConfigError
from eightgig.hardware.nvml import read_nvml, visible_gpu
from eightgig.run import EventKind
from eightgig.training.signals import StopRequest

HYSTERESIS_CELSIUS = 7
"""So much cooler than the limit it goes on: else it would pause every few seconds."""

_LOOK_SECONDS = 5.0
_WAIT_SECONDS = 0.5

Read = Callable[[], int | None]
Say = Callable[[EventKind, dict[str, float]], None]


def read_gpu_celsius() -> int | None:
    """Temperature of the GPU that trains; None where no driver tells."""
    gpu = visible_gpu(read_nvml())
    return None if gpu is None else gpu.temperature_celsius


class HeatGuard:
    """Waits while the GPU is above a temperature.

    Args:
        limit_celsius: Pause above it; 0 never does.
        stop: A request to stop ends the pause.
        say: Called with kind and values of an event, when a pause begins and ends.
        read: Reads the temperature.

    Attributes:
        paused_seconds: Time spent waiting so far.

    Raises:
        ConfigError: There is a limit and no temperature to compare with it.
    """

    def __init__(
        self, limit_celsius: int, stop: StopRequest, say: Say, read: Read = read_gpu_celsius
    ) -> None:
        self._limit = limit_celsius
        self._stop = stop
        self._say = say
        self._read = read
        self._looked_seconds = time.monotonic()
        self.paused_seconds = 0.0
        if limit_celsius and read() is None:
            raise ConfigError(
                "run.pause_above_celsius: the temperature of the GPU cannot be read.",
                why="Without a reading the run would never pause; there is no NVIDIA driver, "
                "or it does not tell.",
                fix="Leave the setting out; see eightgig doctor for what the driver says.",
            )

    def wait(self, beat: Callable[[str], None] = lambda _: None) -> None:
        """Return when the GPU is cool enough, which it usually is at once.

        A reading that fails in between counts as cool: a lost sensor must not hold a run.

        Args:
            beat: Called with what the process is doing, again and again during a pause.
        """
        if not self._limit or time.monotonic() - self._looked_seconds < _LOOK_SECONDS:
            return
        celsius = self._read()
        self._looked_seconds = start_seconds = time.monotonic()
        if celsius is None or celsius <= self._limit:
            return
        enough = self._limit - HYSTERESIS_CELSIUS
        self._say("pause", {"gpu_celsius": celsius, "until_celsius": enough})
        while celsius is not None and celsius > enough and not self._stop.is_requested:
            beat("pause")
            time.sleep(_WAIT_SECONDS)
            if time.monotonic() - self._looked_seconds >= _LOOK_SECONDS:
                celsius = self._read()
                self._looked_seconds = time.monotonic()
        seconds = time.monotonic() - start_seconds
        self.paused_seconds += seconds
        self._say("pause", {"ended_after_seconds": seconds})
