"""A `Config` as text: the copy in a run folder, and the commented file to start from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eightgig.config.describe import describe_groups, describe_settings
from eightgig.config.paths import resolve_paths
from eightgig.config.settings import Config
from eightgig.errors import ConfigError

_RUN_HEADER = "# All settings of this run; paths are absolute.\n"
_EXAMPLE_HEADER = """\
# Settings for eightgig. A line that begins with "# name:" shows a default; delete the "# " to
# change it. "auto" lets the planner decide, which says what it chose and why: `eightgig plan`.
"""


def write_config(config: Config) -> str:
    """`config` as YAML with every setting written out; `read_config` gives it back.

    Paths that are not absolute are taken as relative to the current folder.
    """
    here = Path.cwd()
    groups = dataclasses.asdict(resolve_paths(config, lambda _: here))
    plain = {
        group: {name: _plain(value) for name, value in fields.items()}
        for group, fields in groups.items()
    }
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    if yaml.safe_load(text) != plain:
        # Some characters count as line breaks unless they are written as numbers (U+0085).
        text = yaml.safe_dump(plain, sort_keys=False, width=100)
    return _RUN_HEADER + text


def example_config(values: Mapping[str, object], notes: tuple[str, ...] = ()) -> str:
    """A commented `config.yaml` with every setting and its meaning.

    Args:
        values: Settings (`group.name`) written out; all others stand there as comments.
        notes: Lines for its head, such as what this machine has.
    """
    lines = [_EXAMPLE_HEADER + "".join(f"# {note}\n" for note in notes)]
    groups = describe_groups()
    for group, rows in itertools.groupby(describe_settings(), key=lambda row: row.group):
        lines.append(f"\n# {groups[group]}\n{group}:\n")
        for row in rows:
            value = values.get(f"{group}.{row.name}")
            text = row.default if value is None else _quoted(value)
            mark = "# " if value is None else ""
            lines.append(f"  # {row.help}\n  {mark}{row.name}: {text}\n")
    return "".join(lines)


def write_example(path: Path, values: Mapping[str, object], notes: tuple[str, ...] = ()) -> None:
    """Write `example_config` to the new file `path`.

    Raises:
        ConfigError: `path` exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(example_config(values, notes))
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already.",
            why="A config is never written over.",
            fix="Give another path with --output, or delete the file.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.",
            why="The config is written there.",
            fix="Give a path in a folder that you may write with --output.",
        ) from None


def _quoted(value: object) -> str:
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
