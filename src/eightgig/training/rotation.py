"""The folder of checkpoints: which names mean what, what is deleted, what is set aside."""

from __future__ import annotations

import re
from pathlib import Path

from eightgig.disk import REPLACED_SUFFIX, STAGING_SUFFIX, Disk, failure_cause, remove_tree

TRASH_SUFFIX = ".trash"
BROKEN_SUFFIX = ".broken"
_FOLDER_NAME = re.compile(r"step-([0-9]{6,12})(\.old)?")


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that may be checkpoints, newest first; of one step, the replaced one last.

    Raises:
        OSError: `folder` cannot be read.
    """
    return [path for path in list_named(folder) if is_own_folder(path)]


def is_own_folder(path: Path) -> bool:
    """Whether what has the name of a checkpoint may be one; links are not followed."""
    return path.is_dir() and not path.is_symlink()


def list_named(folder: Path) -> list[Path]:
    """All that has the name of a checkpoint, in the order of `list_checkpoints`.

    Raises:
        OSError: `folder` cannot be read.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _FOLDER_NAME.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def set_aside(path: Path, disk: Disk) -> Path:
    """Rename a damaged checkpoint so that nobody takes it for one; returns its path then."""
    aside, number = path.with_name(path.name + BROKEN_SUFFIX), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{BROKEN_SUFFIX}-{number}")
    try:
        disk.rename(path, aside)
    except OSError:
        # On a disk that cannot be written the name stays; the hashes give it away each time.
        return path
    return aside


def sweep(folder: Path, disk: Disk) -> None:
    """Tidy up what a killed save or rotation left; nothing that may be a checkpoint is deleted.

    Raises:
        OSError: `folder` cannot be read.
    """
    for path in sorted(folder.iterdir()):
        is_left = path.name.endswith((STAGING_SUFFIX, TRASH_SUFFIX))
        current = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
        try:
            if is_left or (current != path and current.exists()):
                remove_tree(path, disk)
            elif current != path:
                # Killed between its two renames: what was to be replaced is the checkpoint again.
                disk.rename(path, current)
        except OSError:
            # It takes space but does no harm; if space is short, the save will say so.
            continue


def rotate(
    folder: Path, *, current_step: int, best_step: int, keep: int, disk: Disk
) -> tuple[tuple[str, ...], str]:
    """Delete all checkpoints but the newest `keep`, the current and the best.

    Returns:
        Names of the deleted ones, and what went wrong, if anything.
    """
    current, best = step_name(current_step), step_name(best_step)
    removed: list[str] = []
    try:
        remove_tree(folder / (current + REPLACED_SUFFIX), disk)
        names = [path.name for path in list_checkpoints(folder) if path.suffix != REPLACED_SUFFIX]
        others = [name for name in names if name != current]
        for name in others[max(keep, 1) - 1 :]:
            if name != best:
                # Renamed first: a kill in between must not leave half a checkpoint by this name.
                trash = folder / (name + TRASH_SUFFIX)
                disk.rename(folder / name, trash)
                remove_tree(trash, disk)
                removed.append(name)
    except OSError as error:
        return tuple(removed), failure_cause(error)
    return tuple(removed), ""
