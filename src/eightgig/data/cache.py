"""Tokens on disk: written while rows are rendered, kept under a name made of their content.

A folder `KEY` appears whole or not at all. Files are raw arrays, mapped when read; what they hold
is said by `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from eightgig.data.sources import Source
from eightgig.errors import DataError
from eightgig.run.files import write_json

VERSION = 1
"""Part of every key; raised whenever rows would become other tokens."""

_KEPT_FOLDERS = 6
_STALE_SECONDS = 86_400
_READ_BYTES = 1 << 22


def content_digest(sources: tuple[Source, ...]) -> str | None:
    """Hash of the bytes of all `sources`; None if one of them is no file."""
    digest = hashlib.sha256()
    for source in sources:
        if source.kind == "datasets":
            return None
        try:
            with Path(source.name).open("rb") as file:
                digest.update(f"{source.kind}:{source.name}\n".encode())
                while data := file.read(_READ_BYTES):
                    digest.update(data)
        except OSError:
            return None
    return digest.hexdigest()


def make_key(parts: Mapping[str, Any]) -> str:
    """Name of the folder for tokens that `parts` decide about."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ArrayWriter:
    """Arrays that grow at their end: files of a folder, or lists in memory.

    Args:
        folder: Where files are written; None keeps all in memory.

    Raises:
        DataError: The folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._digests: dict[str, Any] = {}
        if folder is not None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            except OSError as error:
                raise _not_written(folder, error) from error

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add `values` to the array `name`.

        Raises:
            DataError: The disk is full, or fails.
        """
        data = np.ascontiguousarray(values)
        self._digests.setdefault(name, hashlib.sha256()).update(data.data)
        if self._folder is None:
            self._parts.setdefault(name, []).append(data)
            return
        try:
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
            self._files[name].write(data.data)
        except OSError as error:
            self.discard()
            raise _not_written(self._folder, error) from error

    def close(self) -> None:
        """Write what is not yet written.

        Raises:
            DataError: The disk is full, or fails.
        """
        assert self._folder is not None or not self._files, "files lie in a folder"
        while self._files:
            _, file = self._files.popitem()
            try:
                file.close()
            except OSError as error:
                self.discard()
                raise _not_written(cast("Path", self._folder), error) from error

    def array(self, name: str, dtype: type[np.generic], folder: Path | None = None) -> NDArray[Any]:
        """The whole array `name`, once all is written.

        Args:
            name: As in `append`.
            dtype: Its type.
            folder: Where its file lies now, if it was moved.
        """
        where = self._folder if folder is None else folder
        if where is None:
            parts = self._parts.pop(name, [])
            return np.concatenate(parts) if parts else np.zeros(0, dtype)
        return map_array(where / f"{name}.bin", dtype)

    def fingerprint(self, *names: str) -> str:
        """Hash of the arrays `names`, however they were cut into parts."""
        parts = [self._digests[name].hexdigest() for name in names if name in self._digests]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def discard(self) -> None:
        """Give up; files are deleted."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                continue
        self._files.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def map_array(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """The array in `path`, mapped for reading; empty where the file is missing or empty."""
    if not path.exists() or path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _not_written(folder: Path, error: OSError) -> DataError:
    return DataError(
        f'The tokens cannot be written to "{folder}".',
        why=f"{error.strerror or type(error).__name__}.",
        fix="Free space there, or set `model.cache_dir` to a folder on another disk.",
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None if there is none or a file is of another size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in manifest["sizes"]}
        os.utime(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if isinstance(manifest, dict) and sizes == manifest["sizes"] else None


def publish(staging: Path, target: Path, manifest: Mapping[str, Any]) -> bool:
    """Make `staging` appear as `target`; False where another process was faster."""
    sizes = {path.stem: path.stat().st_size for path in sorted(staging.glob("*.bin"))}
    write_json(staging / "manifest.json", {**manifest, "sizes": sizes})
    try:
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
    except OSError:
        return False
    _forget_oldest(target.parent)
    return True


def _forget_oldest(parent: Path) -> None:
    """Delete all but the folders used last, and what was left by programs that ended early."""
    for folder in parent.glob("*.tmp"):
        if folder.stat().st_mtime < time.time() - _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    folders = [folder for folder in parent.iterdir() if (folder / "manifest.json").is_file()]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_FOLDERS:]:
        shutil.rmtree(folder, ignore_errors=True)
