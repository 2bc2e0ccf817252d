"""Small files of a run folder: whole ones written atomically, lines appended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eightgig.run.records import to_json


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, flush it to the disk and rename it over `path`.

    Neither follows a link: what stands there is replaced, not written through.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` (a record or plain JSON) to `path` atomically."""
    write_atomically(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` (a record or plain JSON) as one line to `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_json(value), ensure_ascii=False) + "\n")
