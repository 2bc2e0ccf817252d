"""Which files `data.path` names. No file is read here but its first bytes.

A folder is never opened as a data set: its README or a script in it could name any other file.
Only files that the user named, or that a glob finds below its own folder, are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eightgig.data.rules import make_finding
from eightgig.errors import Finding

SourceKind = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow", "datasets"]

_KINDS: dict[str, SourceKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst", ".zstd")
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, or one `datasets` name, with rows.

    Attributes:
        name: Path or name as the user knows it; it stands in findings.
        kind: How it is read.
        split: Split of a `datasets` name.
    """

    name: str
    kind: SourceKind
    split: str = "train"


def find_sources(
    path: str | tuple[str, ...], *, split: str = "train"
) -> tuple[tuple[Source, ...], tuple[Finding, ...]]:
    """The files and names that `path` stands for, in a fixed order, each once.

    Args:
        path: File, glob, `datasets` name or folder written by `datasets`' save_to_disk, or several.
        split: Split of `datasets` names.

    Returns:
        The sources, and a finding for each part of `path` that names none.
    """
    sources: dict[str, Source] = {}
    findings: list[Finding] = []
    for part in (path,) if isinstance(path, str) else path:
        for found in _find(part, split):
            if isinstance(found, Source):
                sources.setdefault(found.name, found)
            else:
                findings.append(found)
    return tuple(sources.values()), tuple(findings)


def _find(text: str, split: str) -> Iterable[Source | Finding]:
    path = Path(text).expanduser()
    if path.is_file():
        return [_source(path)]
    if path.is_dir():
        return _saved_dataset(path, split)
    if _MAGIC & set(text):
        return _glob(path)
    if _is_hub_name(text):
        return [Source(name=text, kind="datasets", split=split)]
    return [make_finding("data.not_found", f'There is no file "{text}".', file=text)]


def _source(path: Path) -> Source | Finding:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    kind = _KINDS.get(Path(name).suffix)
    if kind is None:
        suffix = path.suffix or "without a suffix"
        message = f'"{path.name}" is a file of an unknown kind ({suffix}).'
        return make_finding("data.file_kind", message, file=str(path))
    return Source(name=str(path), kind=kind)


def _glob(pattern: Path) -> Iterable[Source | Finding]:
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if _MAGIC & set(part))
    root = Path(*parts[:first]) if first else Path()
    found: list[Source | Finding] = []
    for path in sorted(root.glob(str(Path(*parts[first:])))):
        if not path.is_file():
            continue
        if not path.resolve().is_relative_to(root.resolve()):
            message = f'"{path.name}" is a link out of the folder.'
            found.append(make_finding("data.outside_link", message, file=str(path)))
            continue
        found.append(_source(path))
    if not found:
        message = f'No file matches "{pattern}".'
        return [make_finding("data.not_found", message, file=str(pattern))]
    return found


def _saved_dataset(folder: Path, split: str) -> Iterable[Source | Finding]:
    """The Arrow files of a folder that `datasets` wrote; only those inside it."""
    for candidate in (folder, folder / split):
        state = candidate / "state.json"
        if not state.is_file():
            continue
        try:
            listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            names = [str(entry["filename"]) for entry in listed]
        except (ValueError, KeyError, TypeError, OSError):
            break
        paths = [candidate / name for name in names]
        inside = candidate.resolve()
        if all(path.resolve().parent == inside for path in paths):
            return [Source(name=str(path), kind="arrow") for path in paths]
    message = f'"{folder}" is a folder.'
    return [make_finding("data.folder", message, file=str(folder))]


def _is_hub_name(text: str) -> bool:
    parts = text.split("/")
    allowed = all(
        part[:1].isalnum() and all(c.isalnum() or c in "-_." for c in part) for part in parts
    )
    has_data_suffix = Path(text.lower()).suffix in {*_KINDS, *_PACKED, ".txt"}
    return allowed and len(parts) <= 2 and not text.startswith(".") and not has_data_suffix
