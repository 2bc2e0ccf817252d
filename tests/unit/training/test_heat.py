"""A hot GPU is waited for, down to well below the limit; nothing else stops a run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from eightgig.errors import ConfigError
from eightgig.hardware import nvml
from eightgig.training import heat
from eightgig.training.heat import HYSTERESIS_CELSIUS, HeatGuard, read_gpu_celsius
from eightgig.training.signals import StopRequest


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeNvml:
    """The functions of pynvml that a reading takes, on a card as hot as `celsius` says."""

    class NVMLError(Exception):
        pass

    def __init__(self, celsius: Iterator[int | None]) -> None:
        self._celsius = celsius
        self.readings = 0

    def nvmlDeviceGetTemperature(self, _handle: Any, sensor: int) -> int:  # noqa: N802
        assert sensor == 0
        self.readings += 1
        value = next(self._celsius)
        if value is None:
            raise self.NVMLError
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlClocksThrottleReason"):
            return 0
        answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30, free=7 << 30),
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetUUID": "GPU-1",
            "nvmlDeviceGetName": "A card",
            "nvmlDeviceGetHandleByIndex": 1,
            "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlSystemGetDriverVersion": "580",
            "nvmlInit": None,
            "nvmlShutdown": None,
        }

        def answer(*_: Any) -> Any:
            if name not in answers:
                raise self.NVMLError
            return answers[name]

        return answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heat, "time", clock)
    return clock


def _guard(
    monkeypatch: pytest.MonkeyPatch, limit: int, celsius: list[int | None]
) -> tuple[HeatGuard, FakeNvml, list[tuple[str, dict[str, float]]], StopRequest]:
    fake = FakeNvml(iter(celsius))
    monkeypatch.setattr(heat, "read_nvml", lambda: nvml.read_nvml(fake))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said: list[tuple[str, dict[str, float]]] = []
    stop = StopRequest()
    guard = HeatGuard(limit, stop, lambda kind, values: said.append((kind, values)))
    return guard, fake, said, stop


def test_a_hot_card_is_waited_for_until_it_is_well_below(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the beginning, then each look: one below the limit is still too hot to go on.
    guard, fake, said, _ = _guard(monkeypatch, 80, [60, 80, 81, 79, 74, 73, 75])
    guard.wait()
    assert fake.readings == 1, "a look every few seconds is enough"
    clock.sleep(5)
    guard.wait()
    assert said == [], "at the limit it goes on"
    clock.sleep(5)
    beats: list[str] = []
    guard.wait(beats.append)
    assert said == [
        ("pause", {"gpu_celsius": 81, "until_celsius": 80 - HYSTERESIS_CELSIUS}),
        ("pause", {"ended_after_seconds": 15.0}),
    ]
    assert guard.paused_seconds == 15.0
    assert set(beats) == {"pause"}
    clock.sleep(5)
    guard.wait()
    assert len(said) == 2


def test_without_a_limit_nobody_looks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, fake, said, _ = _guard(monkeypatch, 0, [])
    clock.sleep(100)
    guard.wait()
    assert (fake.readings, said) == (0, [])


def test_a_stop_ends_the_pause(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, _, said, stop = _guard(monkeypatch, 80, [60, *[90] * 9])
    clock.sleep(5)

    def beat(_: str) -> None:
        if clock.now > 1_010:
            stop.signal_name = "SIGINT"

    guard.wait(beat)
    assert said[-1][1]["ended_after_seconds"] < 10


def test_a_sensor_that_is_lost_holds_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, _, said, _ = _guard(monkeypatch, 80, [60, 90, None, None])
    clock.sleep(5)
    guard.wait()
    assert len(said) == 2
    clock.sleep(5)
    guard.wait()
    assert len(said) == 2


@pytest.mark.parametrize("celsius", [[None], []])
def test_a_limit_without_a_reading_is_refused(
    monkeypatch: pytest.MonkeyPatch, celsius: list[int | None]
) -> None:
    with pytest.raises(ConfigError, match=r"run\.pause_above_celsius") as caught:
        if celsius:
            _guard(monkeypatch, 80, celsius)
        else:
            HeatGuard(80, StopRequest(), lambda *_: None, read=lambda: None)
    assert caught.value.exit_code == 2


def test_the_card_that_trains_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(iter([61, 62]))
    monkeypatch.setattr(heat, "read_nvml", lambda: nvml.read_nvml(fake))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert read_gpu_celsius() == 61
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert read_gpu_celsius() is None
