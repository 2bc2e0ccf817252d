"""Every probe is watched: no code, no file elsewhere, no network, no endless work."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests import tiny_run
from tests.faults.tally import Tally, tally_of
from tests.security.watch import SECRET, Watch, switch_off, switch_on

# On a machine with others; the limits inside are of two seconds of computing.
SECONDS = 60


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model's folder, to be copied."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_run.make_tame_model("llama", folder)
    return folder


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts for the tables."""
    return tally_of(request.config)


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the user's that nobody may read."""
    path = tmp_path_factory.mktemp("outside") / "secret.txt"
    path.write_text(SECRET + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def watch(
    base_model: Path, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Watch]:
    """Watches a probe, and judges it when it is over."""
    cache = str(tmp_path / "home")
    monkeypatch.setenv("HOME", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{cache}/.cache")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    Path(cache).mkdir()
    # Files without a name are opened as their folder.
    nameless = str(Path(tempfile.gettempdir()).resolve())
    places = [str(tmp_path.resolve()), str(Path(nameless, "tmp"))]
    watch = Watch(places=places, secrets=[str(outside.resolve())], nameless=nameless)

    def give_up(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it did not end within {SECONDS} s")

    has_alarm = hasattr(signal, "SIGALRM")
    if has_alarm:
        before = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(SECONDS)
    switch_on(watch)
    try:
        yield watch
    finally:
        switch_off()
        if has_alarm:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    assert watch.events == []
    assert not list(tmp_path.rglob("PWNED"))
    leaked = [
        str(path)
        for path in tmp_path.rglob("*")
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes()
    ]
    assert leaked == []
