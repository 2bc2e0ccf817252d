"""An export appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import errno
from io import FileIO
from pathlib import Path

import pytest

from eightgig.disk import Disk
from eightgig.errors import DoesNotFitError, ExportError
from eightgig.export.folder import RECORD_NAME, output_folder, small_files


class FullDisk(Disk):
    """Takes `room_bytes` and no more."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes

    def write(self, file: FileIO, data: memoryview) -> int:
        if self.room_bytes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(file, data[: self.room_bytes])
        self.room_bytes -= written
        return written


def test_a_folder_appears_with_its_files_and_their_hashes(tmp_path: Path) -> None:
    with output_folder(tmp_path / "new" / "export", needed_bytes=10) as output:
        output.write("a.txt", b"abc")
        assert not (tmp_path / "new" / "export").exists()
    assert (tmp_path / "new" / "export" / "a.txt").read_bytes() == b"abc"
    assert output.files["a.txt"].size_bytes == 3
    assert output.files["a.txt"].sha256.startswith("ba7816bf")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["export"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="the disk is full"),
        output_folder(tmp_path / "export", needed_bytes=0, disk=FullDisk(5)) as output,
    ):
        output.write("a.txt", b"abc")
        output.write("b.txt", b"defghi")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_or_interruption_leaves_nothing_behind(
    tmp_path: Path, error: BaseException
) -> None:
    with (
        pytest.raises(type(error)),
        output_folder(tmp_path / "export", needed_bytes=0) as output,
    ):
        output.write("a.txt", b"abc")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(DoesNotFitError, match=r"The export takes 1024\.00 TiB") as caught,
        output_folder(tmp_path / "a" / "export", needed_bytes=1 << 50),
    ):
        raise AssertionError("the block must not begin")
    assert "--output" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with output_folder(target, needed_bytes=0) as output:
        output.write(RECORD_NAME, b"{}")
        output.write("old.txt", b"")
    with output_folder(target, needed_bytes=0) as output:
        output.write("new.txt", b"")
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    for place in (target, tmp_path / "file"):
        if place != target:
            place.write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ExportError, match="was not written to") as caught,
            output_folder(place, needed_bytes=0),
        ):
            raise AssertionError("the block must not begin")
        assert "--output" in caught.value.fix
    assert [path.name for path in target.iterdir()] == ["new.txt"]


def test_a_failed_export_keeps_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with output_folder(target, needed_bytes=0) as output:
        output.write(RECORD_NAME, b"{}")
    with pytest.raises(ValueError, match="x"), output_folder(target, needed_bytes=0) as output:
        output.write("half.txt", b"")
        raise ValueError("x")
    assert [path.name for path in target.iterdir()] == [RECORD_NAME]


def test_small_files_are_those_of_a_model_and_no_others(tmp_path: Path) -> None:
    wanted = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json",
              "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    others = ["README.md", "model.safetensors", "pytorch_model.bin", "notes.txt", "run.py"]
    for name in wanted + others:
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert [path.name for path in small_files(tmp_path)] == wanted
