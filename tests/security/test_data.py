"""Hostile data files: archives, links, pickles, bombs, and what a terminal would obey."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.console import Console

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from eightgig.data.read import read_rows
from eightgig.data.sources import find_sources
from eightgig.errors import Finding
from tests.chats import make_chat_tokenizer

resource = pytest.importorskip("resource", reason="Windows limits otherwise")

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'


@contextmanager
def _memory(mebibytes: int) -> Iterator[None]:
    """Nothing inside may take more than so much more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _codes(path: Path | str) -> list[str]:
    """Codes of the findings when all of it is read."""
    sources, findings = find_sources(str(path))
    for source in sources:
        findings = (*findings, *(item for item in read_rows(source) if isinstance(item, Finding)))
    return [finding.code for finding in findings]


def _gzip_bomb(member: bytes, times: int) -> bytes:
    return gzip.compress(member, 6) * times


BOMBS: dict[str, tuple[str, bytes]] = {
    "gzip: one line of 640 MB": ("a.jsonl.gz", _gzip_bomb(b" " * (64 << 20), 10)),
    "gzip: one JSON text of 640 MB": (
        "a.json.gz",
        gzip.compress(b'[{"messages": "') + _gzip_bomb(b"x" * (64 << 20), 10),
    ),
    "gzip: one cell of 640 MB": (
        "a.csv.gz", gzip.compress(b'text\n"') + _gzip_bomb(b"x" * (64 << 20), 10)
    ),
    "zstd: one line of 640 MB": (
        "a.jsonl.zst", zstandard.ZstdCompressor().compress(b" " * (64 << 20)) * 10
    ),
    "zstd: a window of gigabytes": (
        "a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\xf8" + b"\0" * 64
    ),
    "gzip in gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(b" " * (64 << 20)) * 10)),
    "gzip by another name": ("a.jsonl", _gzip_bomb(b" " * (64 << 20), 10)),
    "gzip that is cut off": ("a.jsonl.gz", gzip.compress(ROW * 1000)[:-20]),
    "gzip with a wrong sum": (
        "a.jsonl.gz", gzip.compress(ROW)[:-8] + b"\0" * 8
    ),
    "deeply nested": ("a.jsonl", b'{"a":' * 500_000 + b"\n"),
    "a deep list": ("a.json", b"[" * 500_000),
    "a number of a million digits": ("a.jsonl", b'{"messages": ' + b"9" * 1_000_000 + b"}\n"),
    "200,000 columns": ("a.csv", b",".join(b"c%d" % n for n in range(200_000)) + b"\n1\n"),
    "a quote without end": ("a.csv", b'text\n"' + b"x" * (70 << 20)),
    "no line without end": ("a.jsonl", b"x" * (70 << 20)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "another name" in name else ())
        for name in BOMBS
    ],
)
def test_a_bomb_is_a_finding_in_little_memory(name: str, tmp_path: Path) -> None:
    file, content = BOMBS[name]
    (tmp_path / file).write_bytes(content)
    with _memory(700):
        config = DataConfig(path=str(tmp_path / file))
        report = check_data(config, make_chat_tokenizer("llama3"), workers=0)
    assert any(finding.severity == "error" for finding in report.findings)


def _archive(kind: str, inside: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(inside, ROW)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            info = tarfile.TarInfo(inside)
            info.size = len(ROW)
            tar.addfile(info, io.BytesIO(ROW))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("inside", ["../../PWNED", "/tmp/PWNED", "rows.jsonl"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.zip", "a.tar.gz", "a.tgz"])
def test_an_archive_is_never_unpacked(name: str, inside: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(_archive(kind, inside))
    config = DataConfig(path=str(tmp_path / name))
    report = check_data(config, make_chat_tokenizer("llama3"), workers=0)
    assert any(finding.severity == "error" for finding in report.findings)
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == [name]


class _Payload:
    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._place / "PWNED"),)


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.pickle", "a.pt", "a.pth", "a.bin", "a.npy", "a.npz", "a.joblib", "a.h5",
             "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.py", "a.sh", "a.xml",
             "a.yaml", "a.sqlite"],
)  # fmt: skip
def test_a_pickle_is_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(_Payload(tmp_path)))
    config = DataConfig(path=str(tmp_path / name))
    report = check_data(config, make_chat_tokenizer("llama3"), workers=0)
    assert any(finding.severity == "error" for finding in report.findings)


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1:9/a.jsonl", "https://evil.example/a.jsonl", "file:///etc/passwd",
     "hf://datasets/evil/a.jsonl", "s3://evil/a.jsonl", "ftp://evil/a.csv", "/dev/zero",
     "/dev/stdin", "/proc/self/environ", "-", "|id", "$(id).jsonl", "a/b/c", "../../../nothing",
     "zip://a.jsonl::http://evil/a.zip"],
)  # fmt: skip
def test_a_strange_name_is_not_opened(name: str) -> None:
    sources, findings = find_sources(name)
    assert sources == ()
    assert findings


def test_a_glob_follows_no_link_out_of_its_folder(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(outside)
    (tmp_path / "data" / "b").symlink_to(outside.parent, target_is_directory=True)
    assert _codes(tmp_path / "data" / "*.jsonl") == ["data.outside_link"]
    sources, _ = find_sources(str(tmp_path / "data" / "**" / "*"))
    assert not any("secret" in source.name for source in sources)


@pytest.mark.parametrize(
    "name", ["../outside.arrow", "/etc/passwd", "a/../../x.arrow", "link.arrow"]
)
def test_a_saved_data_set_names_no_file_elsewhere(name: str, tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link.arrow").symlink_to(outside)
    state = {"_data_files": [{"filename": name}]}
    (folder / "state.json").write_text(json.dumps(state))
    sources, findings = find_sources(str(folder))
    assert sources == ()
    assert [finding.code for finding in findings] == ["data.folder"]


@pytest.mark.parametrize("name", ["README.md", "set.py", "dataset_infos.json", "data.yaml"])
def test_a_folder_is_not_opened_as_its_readme_says(
    name: str, tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_text(f"---\nconfigs:\n- data_files: {outside}\n---\n")
    sources, findings = find_sources(str(folder))
    assert sources == ()
    assert [finding.code for finding in findings] == ["data.folder"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert _codes(tmp_path / "a.jsonl") == ["data.not_found"]


CONTROL = (
    "\x1b[2J\x1b[H",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1b]8;;http://evil\x07x",
    "\x9b31m",
    "\r",
    "\x08",
)


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("place", ["content", "role", "key", "file"])
def test_a_terminal_is_not_told_what_to_do(
    place: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eightgig.cli.data_view import show_data

    row = {
        "messages": [
            {"role": f"user{text}" if place == "role" else "user", "content": f"Hi {text}"},
            {"role": "assistant", "content": f"Yo {text}"},
        ]
    }
    shown = {f"a{text}": 1, **row} if place == "key" else row
    name = f"a{text.replace('/', '')}.jsonl" if place == "file" else "a.jsonl"
    path = tmp_path / name
    path.write_text((json.dumps(shown) + "\n") * 3, encoding="utf-8")
    report = check_data(DataConfig(path=str(path)), make_chat_tokenizer("llama3"), workers=0)
    show_data(report, token_ids=True, as_json=False)
    written = capsys.readouterr()
    for stream in (written.out, written.err):
        assert not any(character in stream for character in "\x1b\x9b\x07\x08\r")


def test_markup_in_a_row_is_no_markup(tmp_path: Path) -> None:
    from eightgig.cli.progress import _notice_text

    finding = Finding(severity="error", code="x", message="[link=http://evil]a[/link]", why="",
                      fix="[bold]", file="[red]f")  # fmt: skip
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(_notice_text(finding))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[link=http://evil]a[/link]" in text
    assert "\x1b]8" not in text
