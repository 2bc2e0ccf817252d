"""The folder of an export: room is checked first, and it appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from eightgig.disk import (
    Disk,
    FileDigest,
    StagedFolder,
    digest_file,
    failure_cause,
    remove_tree,
    staging_path,
)
from eightgig.errors import DoesNotFitError, ExportError
from eightgig.run import link_outside
from eightgig.units import MIB, format_bytes

RECORD_NAME = "export.json"
"""Marks a folder as an export of ours, which a later one may replace."""

TEMPLATE_NAME = "chat_template.jinja"
MAX_SMALL_FILE_BYTES = 256 * MIB
_MARGIN_BYTES = 64 * MIB
_COPY_BYTES = 8 * MIB
# What a model folder holds besides its weights and its card.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template*", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProgress:
    """How far an export is; shown, not kept.

    Attributes:
        work: What is done, for example `merging`.
        done_bytes, total_bytes: Of what is written.
    """

    work: str
    done_bytes: int
    total_bytes: int


@dataclass(slots=True)
class OutputFolder:
    """An export that is being written.

    Attributes:
        path: Where its files are until it is published.
        files: Size and hash of every file written so far.
    """

    path: Path
    _staged: StagedFolder
    files: dict[str, FileDigest] = field(default_factory=dict)

    def write(self, name: str, parts: Iterator[bytes | memoryview] | bytes) -> None:
        """Write one file of the export.

        Raises:
            OSError: The disk is full, or fails.
        """
        self.files[name] = self._staged.write(name, [parts] if isinstance(parts, bytes) else parts)

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy one file into the export, byte for byte.

        Raises:
            OSError: It cannot be read or written.
        """
        self.write(name or source.name, _file_parts(source))

    def adopt(self, name: str) -> None:
        """Take note of a file that another program wrote into `path`, and flush it to the disk.

        Raises:
            OSError: It cannot be read.
        """
        disk = Disk()
        with (self.path / name).open("rb", buffering=0) as file:
            disk.flush(file)
        self.files[name] = digest_file(self.path / name, disk)

    def remove(self, name: str) -> None:
        """Delete a file of the export again.

        Raises:
            OSError: It cannot be deleted.
        """
        Disk().remove_file(self.path / name)
        self.files.pop(name, None)


@contextmanager
def output_folder(
    target: Path, *, needed_bytes: int, disk: Disk | None = None
) -> Iterator[OutputFolder]:
    """A folder to export into; it is published when the block ends well, else deleted.

    Args:
        target: Where it shall appear. An earlier export there is replaced.
        needed_bytes: Bytes that will be written.
        disk: The operations to write with.

    Raises:
        ExportError: Something else stands at `target`, or the disk fails.
        DoesNotFitError: The disk has too little room.
    """
    disk = disk or Disk()
    _check_target(target)
    try:
        # What an export that was killed left there is room, too.
        remove_tree(staging_path(target), disk)
        check_room(target, needed_bytes, disk)
        staged = StagedFolder(target, disk)
        try:
            yield OutputFolder(staging_path(target), staged)
            staged.publish()
        except BaseException:
            staged.discard()
            if target.exists():
                with suppress(OSError):
                    staged.remove_replaced()
            raise
    except OSError as error:
        raise ExportError(
            f"The export was not written to {target}: {failure_cause(error)}.",
            why="What was written of it has been deleted; the run is as it was.",
            fix="Free disk space, or choose another place with --output.",
        ) from error
    with suppress(OSError):
        # The export is there; what it replaced takes space and does no harm.
        staged.remove_replaced()


def check_room(target: Path, needed_bytes: int, disk: Disk) -> None:
    """Compare what will be written with what is free where `target` lies.

    Raises:
        DoesNotFitError: There is too little room.
    """
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    free_bytes = disk.free_bytes(place)
    if needed_bytes + _MARGIN_BYTES > free_bytes:
        raise DoesNotFitError(
            f"The export takes {format_bytes(needed_bytes)}; {format_bytes(free_bytes)} are free "
            f"on the disk of {target.parent}.",
            why="A model that is cut off where the disk ended would be of no use.",
            fix=f"Free {format_bytes(needed_bytes + _MARGIN_BYTES - free_bytes)} there, or choose "
            "a folder on another disk with --output.",
        )


def small_files(folder: Path) -> list[Path]:
    """Config, tokenizer, template and licence files of the model in `folder`.

    Raises:
        ExportError: One is a link to a file elsewhere.
    """
    found = {
        path
        for pattern in _SMALL_FILES
        for path in folder.glob(pattern)
        if path.is_file() and path.stat().st_size <= MAX_SMALL_FILE_BYTES
    }
    link = link_outside(folder, sorted(found))
    if link is not None:
        raise ExportError(
            f"{link} is a link to a file outside the model's folder.",
            why="It would be copied into the export, which people upload.",
            fix="If the link is yours, put the file itself in its place; otherwise delete it.",
        )
    return sorted(found)


def copy_model_files(
    output: OutputFolder, base: Path, *, template: str | None = None, skip: tuple[str, ...] = ()
) -> None:
    """Copy what `small_files` lists.

    Args:
        output: Where to.
        base: Folder of the base model.
        template: The chat template that was trained with, where the model's own was not.
        skip: Names that are written otherwise.
    """
    for path in small_files(base):
        if path.name not in skip and not (template is not None and path.name == TEMPLATE_NAME):
            output.copy(path)
    if template is not None:
        output.write(TEMPLATE_NAME, template.encode("utf-8"))


def small_files_bytes(base: Path) -> int:
    """Bytes of what `copy_model_files` copies."""
    return sum(path.stat().st_size for path in small_files(base))


def find_program(names: tuple[str, ...]) -> str | None:
    """The first of the programs `names` that is installed."""
    return next((path for name in names if (path := shutil.which(name))), None)


def _check_target(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        what = "a file of that name is there"
    elif (target / RECORD_NAME).is_file():
        return
    else:
        what = f"the folder is there, and no {RECORD_NAME} in it says that it is an export"
    raise ExportError(
        f"The export was not written to {target}: {what}.",
        why="Only an earlier export is replaced.",
        fix="Choose another place with --output, or move what is there.",
    )


def _file_parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_COPY_BYTES):
            yield part
