"""Which settings are paths, and what they are relative to."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from eightgig.config.settings import AUTO, DEMO_MODEL, Config, ModelConfig
from eightgig.errors import ConfigError

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
_PATH_START = re.compile(r"[~/\\.]|[A-Za-z]:[\\/]")
_GLOB = re.compile(r"[*?\[]")

# Always paths. `model.name`, `data.path` and `data.chat_template` may be names of the hub, too.
_PATHS = ("model.cache_dir", "data.held_out_path", "lora.init_adapter", "run.output_dir")


def store_folder(config: ModelConfig) -> Path:
    """The folder of all prepared weights: the configured one, or the user's cache folder."""
    if config.cache_dir != AUTO:
        return expand_home(config.cache_dir)
    return default_cache_dir()


def default_cache_dir() -> Path:
    """Where prepared weights are kept unless the config says otherwise.

    Raises:
        ConfigError: This user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "eightgig"
    try:
        return Path.home() / ".cache" / "eightgig"
    except RuntimeError:
        raise ConfigError(
            "This user has no home folder: HOME is not set.",
            why="Prepared weights and downloads are kept in its .cache folder.",
            fix="export HOME=/a/folder/you/may/write/to",
        ) from None


def expand_home(text: str) -> Path:
    """`text` as a path, with the home folder for `~`.

    Raises:
        ConfigError: There is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{text}: there is no such home folder.",
            why="~ stands for the home folder of this user, ~name for that of another.",
            fix="Write the whole path.",
        ) from None


def looks_like_path(text: str) -> bool:
    """Whether `text` can only be a path or a glob, not a name on the hub."""
    if _PATH_START.match(text) or _GLOB.search(text) or "\\" in text:
        return True
    name = text.lower()
    for packed in _PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    return name.endswith(_DATA_SUFFIXES)


def resolve_paths(config: Config, folder_of: Callable[[str], Path]) -> Config:
    """`config` with every path absolute.

    Args:
        config: As written.
        folder_of: Folder that the paths of a setting (`group.name`) are relative to.
    """
    groups: dict[str, dict[str, object]] = {"model": {}, "data": {}, "lora": {}, "run": {}}
    for setting in _PATHS:
        group, _, name = setting.partition(".")
        text = getattr(getattr(config, group), name)
        if text not in (None, AUTO):
            groups[group][name] = _absolute(text, folder_of(setting))
    model, data = config.model, config.data
    if model.name != DEMO_MODEL:
        groups["model"]["name"] = _path_or_name(model.name, folder_of("model.name"))
    if data.chat_template is not None:
        folder = folder_of("data.chat_template")
        groups["data"]["chat_template"] = _path_or_name(data.chat_template, folder)
    folder = folder_of("data.path")
    groups["data"]["path"] = (
        _path_or_name(data.path, folder)
        if isinstance(data.path, str)
        else tuple(_path_or_name(path, folder) for path in data.path)
    )
    changed = {
        group: dataclasses.replace(getattr(config, group), **values)
        for group, values in groups.items()
    }
    return dataclasses.replace(config, **changed)


def _path_or_name(text: str, folder: Path) -> str:
    path = _absolute(text, folder)
    return path if looks_like_path(text) or Path(path).exists() else text


def _absolute(text: str, folder: Path) -> str:
    return str((folder / expand_home(text)).absolute())
