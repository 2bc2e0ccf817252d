"""The operations that folders are written with."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from eightgig.disk import Disk, StagedFolder, failure_cause, make_folders, remove_tree


def _fail_fsync(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folders")
def test_a_file_system_without_flushing_of_folders_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_fsync(errno.EINVAL, monkeypatch)
    Disk().flush_folder(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folders")
def test_an_error_while_flushing_a_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_fsync(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Disk().flush_folder(tmp_path)


def test_deleting_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    remove_tree(tmp_path / "inside", Disk())
    remove_tree(tmp_path / "nothing", Disk())
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / "precious").exists()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    make_folders(tmp_path / "a" / "b", Disk())
    make_folders(tmp_path / "a" / "b", Disk())
    assert (tmp_path / "a" / "b").is_dir()


def test_a_staged_folder_is_invisible_until_it_is_published(tmp_path: Path) -> None:
    staged = StagedFolder(tmp_path / "x", Disk())
    digest = staged.write("file", [b"ab", memoryview(b"c")])
    assert digest.size_bytes == 3
    assert digest.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert not (tmp_path / "x").exists()
    staged.publish()
    assert (tmp_path / "x" / "file").read_bytes() == b"abc"


def test_an_unknown_cause_is_in_the_system_s_words() -> None:
    assert failure_cause(OSError(errno.EISDIR, "Is a directory")) == "Is a directory"
    assert failure_cause(OSError("odd")) == "OSError"
