"""Faults that are planted in a whole process of `eightgig`, before its command begins."""

from __future__ import annotations

import time
from typing import Any


def slow_steps(seconds: float) -> None:
    """Every step after the first takes so much longer."""
    from eightgig.training import loop

    real_step = loop.run_step

    def slow_step(engine: Any, prepared: Any) -> tuple[float, float]:
        if prepared.step > 1:
            time.sleep(seconds)
        return real_step(engine, prepared)

    loop.run_step = slow_step
