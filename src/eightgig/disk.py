"""Folders that survive a crash: written beside, flushed, renamed, read back.

Every operation goes through a `Disk`, so that tests can make each single one fail. Nothing here
knows what the files mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

STAGING_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".old"
READ_BYTES = 8 << 20
# Some network and FUSE file systems know no fsync of a folder; there is nothing else to do then.
_FOLDER_FLUSH_UNKNOWN = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


class Disk:
    """The operations that folders are written with, one system call each."""

    def make_folder(self, path: Path) -> None:
        """Create the folder `path`; it must not exist, its parent must."""
        path.mkdir()

    def create(self, path: Path) -> FileIO:
        """Create the file `path` for unbuffered writing; it must not exist."""
        return FileIO(path, "xb")

    def write(self, file: FileIO, data: memoryview) -> int:
        """Write the beginning of `data`; returns how many bytes."""
        return file.write(data)

    def flush(self, file: FileIO) -> None:
        """Return when the bytes of `file` are on the disk."""
        os.fsync(file.fileno())

    def close(self, file: FileIO) -> None:
        """Close `file`."""
        file.close()

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, in one step."""
        source.replace(target)

    def flush_folder(self, path: Path) -> None:
        """Return when the names in `path` are on the disk. Windows does this by itself."""
        if sys.platform == "win32":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _FOLDER_FLUSH_UNKNOWN:
                raise
        finally:
            os.close(descriptor)

    def remove_file(self, path: Path) -> None:
        """Delete the file `path`."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Delete the empty folder `path`."""
        path.rmdir()

    def open(self, path: Path) -> FileIO:
        """Open the file `path` for unbuffered reading."""
        return FileIO(path, "rb")

    def read(self, file: FileIO) -> bytes:
        """The next bytes of `file`; empty at its end."""
        return file.read(READ_BYTES) or b""

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written where `path` lies."""
        return shutil.disk_usage(path).free


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """A file's size and content in short."""

    size_bytes: int
    sha256: str


class StagedFolder:
    """A folder that is written beside its place and appears there whole.

    Args:
        target: Where it shall appear. What stands there now is kept as `TARGET.old` until the
            caller removes it with `remove_replaced`.
        disk: The operations to use.

    Raises:
        OSError: A leftover cannot be removed, or the folder not be created.
    """

    def __init__(self, target: Path, disk: Disk) -> None:
        self._target = target
        self._staging = staging_path(target)
        self._disk = disk
        make_folders(target.parent, disk)
        remove_tree(self._staging, disk)
        try:
            disk.make_folder(self._staging)
        except BaseException:  # Ctrl-C, after it was made
            self.discard()
            raise

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> FileDigest:
        """Write one file from its `parts` and flush it to the disk.

        Raises:
            OSError: The disk is full, or fails.
        """
        disk, size_bytes, digest = self._disk, 0, hashlib.sha256()
        file = disk.create(self._staging / name)
        try:
            for part in parts:
                rest = memoryview(part)
                digest.update(rest)
                size_bytes += rest.nbytes
                while rest.nbytes:
                    rest = rest[disk.write(file, rest) :]
            disk.flush(file)
        finally:
            disk.close(file)
        return FileDigest(size_bytes=size_bytes, sha256=digest.hexdigest())

    def publish(self) -> None:
        """Make the folder appear at its place, for good.

        Raises:
            OSError: It did not appear, or might not outlive a power cut. What stood there
                before is there again or is `TARGET.old`.
        """
        disk, target = self._disk, self._target
        replaced = target.with_name(target.name + REPLACED_SUFFIX)
        disk.flush_folder(self._staging)
        try:
            if target.exists():
                remove_tree(replaced, disk)
                disk.rename(target, replaced)
            disk.rename(self._staging, target)
        except BaseException:  # a failure, or Ctrl-C between the two
            if replaced.exists() and not target.exists():
                disk.rename(replaced, target)
            raise
        disk.flush_folder(target.parent)

    def remove_replaced(self) -> None:
        """Delete what stood at the target before.

        Raises:
            OSError: It cannot be deleted; it does no harm where it is.
        """
        remove_tree(self._target.with_name(self._target.name + REPLACED_SUFFIX), self._disk)

    def discard(self) -> None:
        """Delete what was written so far, as far as the disk allows."""
        try:
            remove_tree(self._staging, self._disk)
        except OSError:
            # The failure that led here is the one to report; the next save removes the rest.
            return


def staging_path(target: Path) -> Path:
    """Where a `StagedFolder` is until it appears at `target`."""
    return target.with_name(target.name + STAGING_SUFFIX)


def make_folders(path: Path, disk: Disk) -> None:
    """Create `path` and its missing parents, each flushed into its own parent."""
    if path.is_dir():
        return
    make_folders(path.parent, disk)
    disk.make_folder(path)
    disk.flush_folder(path.parent)


def remove_tree(path: Path, disk: Disk) -> None:
    """Delete `path` and all in it, if it exists; links are deleted, never followed."""
    if path.is_symlink() or path.is_file():
        disk.remove_file(path)
        return
    if not path.exists():
        return
    for inner in sorted(path.iterdir()):
        remove_tree(inner, disk)
    disk.remove_folder(path)


def digest_file(path: Path, disk: Disk) -> FileDigest:
    """Size and SHA-256 of the file `path`, read from the disk where the system allows it."""
    size_bytes, digest = 0, hashlib.sha256()
    file = disk.open(path)
    try:
        if sys.platform == "linux":
            # Flushed pages are dropped, so that what is read back is what the disk holds.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := disk.read(file):
            digest.update(part)
            size_bytes += len(part)
    finally:
        disk.close(file)
    return FileDigest(size_bytes=size_bytes, sha256=digest.hexdigest())


def failure_cause(error: OSError) -> str:
    """What `error` means for somebody who wants a file written, in a few words."""
    causes = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "your disk quota is used up",
        errno.EIO: "the disk reports an input/output error",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "writing there is not permitted",
        errno.EPERM: "writing there is not permitted",
        errno.EFBIG: "the file system allows no file of this size",
        errno.ENOENT: "the folder is gone",
        errno.ENODEV: "the drive is gone",
        errno.ENXIO: "the drive is gone",
        errno.ESTALE: "the network drive is gone",
    }
    return causes.get(error.errno or 0, error.strerror or type(error).__name__)
