"""An audit hook that says what Python does: unpickling, running code, opening, connecting."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "hf_CANARYcanaryCANARYcanary0123456789"
_CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
    | {str(Path(sys.base_prefix).resolve()), str(Path(sys.prefix).resolve())}
)
# Code that libraries make: dataclasses and namedtuple, Jinja's templates, frozen modules.
_MADE = (
    "<string>",
    "<template>",
    "<frozen",
    "<attrs",
    "<lambdifygenerated",
    "<eval_with_key>",
    "<unknown>",
)


@dataclass
class Watch:
    """What has happened since it was switched on.

    Attributes:
        places: Folders that may be written, and whose Python files may be run.
        secrets: Files that must not be opened.
        nameless: Folder of files that have no name.
        events: What must not happen and did.
    """

    places: list[str]
    secrets: list[str]
    nameless: str = ""
    events: list[str] = field(default_factory=list)
    is_on: bool = True

    def see(self, name: str, arguments: tuple[Any, ...]) -> None:
        """The hook."""
        if name in _CODE or name in _NETWORK:
            self.events.append(f"{name} {arguments!r:.200}")
        elif name == "subprocess.Popen":
            words = [os.fsdecode(word) for word in arguments[1]]
            own = ("eightgig.data.worker", "eightgig.hardware.facts")
            # Python asks for the machine, Matplotlib for the fonts.
            is_known = words[0] in ("uname", "fc-list")
            if not any(word in words for word in own) and not is_known:
                self.events.append(f"{name} {words!r:.200}")
        elif name == "exec":
            file = getattr(arguments[0], "co_filename", "?")
            if not self._is_known_code(str(file)):
                self.events.append(f"exec of {file}")
        elif name == "open":
            self._see_open(*arguments)

    def _is_known_code(self, file: str) -> bool:
        path = os.path.realpath(file) if file.startswith(os.sep) else file
        return path.startswith((*_LIBRARIES, *_own_folders())) or file.startswith(_MADE)

    def _see_open(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        real = os.path.realpath(os.fsdecode(path))
        if real in self.secrets:
            self.events.append(f"open {real}")
        writes = (isinstance(flags, int) and flags & _WRITES) or (
            isinstance(mode, str) and set(mode) & set("wxa+")
        )
        # /dev/null, and what libraries keep beside themselves.
        is_allowed = real.startswith((*self.places, "/dev/", "/proc/")) or "__pycache__" in real
        is_allowed = is_allowed or real == self.nameless
        if writes and not is_allowed:
            self.events.append(f"write {real}")


def _own_folders() -> Iterable[str]:
    root = Path(__file__).resolve().parents[2]
    return (str(root / "src"), str(root / "tests"))


_CURRENT: list[Watch] = []
_IS_INSTALLED: list[bool] = []


def switch_on(watch: Watch) -> None:
    """Let `watch` see everything from now on; a hook can never be removed, only ignored."""
    _CURRENT[:] = [watch]
    if not _IS_INSTALLED:
        _IS_INSTALLED.append(True)
        sys.addaudithook(_hook)


def switch_off() -> None:
    """Nobody looks."""
    _CURRENT.clear()


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    for watch in _CURRENT:
        if watch.is_on:
            watch.is_on = False  # what the watch itself opens is no event
            try:
                watch.see(name, arguments)
            finally:
                watch.is_on = True
