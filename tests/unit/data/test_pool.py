"""Rows rendered in other processes are the same rows; processes that fail are noticed."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from eightgig.config import DataConfig
from eightgig.data import pool as pools
from eightgig.data import prepare
from eightgig.data.chunks import (
    ARRAYS,
    Chunk,
    ChunkRenderer,
    Job,
    read_chunk,
    read_message,
    read_tokens,
    write_chunk,
    write_message,
    write_tokens,
)
from eightgig.data.formats import RowShape
from eightgig.data.pool import WorkerPool
from eightgig.data.prepare import Preparation, tokenise
from eightgig.data.raw import RawRow
from eightgig.data.sources import Source
from eightgig.data.tokenizer import render_settings
from eightgig.errors import DataError
from eightgig.run import write_json
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, write_lines


@pytest.fixture(scope="module")
def settings():
    return render_settings(make_chat_tokenizer("llama3"))


def make_chunk(*data: bytes) -> Chunk:
    rows = tuple(RawRow(line=n, data=row) for n, row in enumerate(data, start=1))
    shape = RowShape(format="messages", columns={"messages": "turns"}, group_column="case")
    return Chunk(file="a.jsonl", shape=shape, rows=rows)


def test_messages_travel_whole():
    stream = io.BytesIO()
    write_message(stream, {"a": "ü"}, [b"", b"xyz", memoryview(np.arange(3, dtype=np.int32))])
    write_message(stream, {}, [])
    stream.seek(0)
    header, parts = read_message(stream)
    assert header == {"a": "ü"}
    assert parts == [b"", b"xyz", np.arange(3, dtype=np.int32).tobytes()]
    assert read_message(stream) == ({}, [])
    assert read_message(stream) is None


def test_chunks_travel_whole():
    stream = io.BytesIO()
    chunk = make_chunk(b'{"a": 1}', b"\xff\x00", b"")
    write_chunk(stream, chunk)
    stream.seek(0)
    assert read_chunk(stream) == chunk
    assert read_chunk(stream) is None


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_travel_whole(settings, is_deep, rows):
    renderer = ChunkRenderer(Job(settings=settings, train_on="assistant", is_deep=is_deep))
    turns = b'{"turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%d"}]'
    chunk = make_chunk(*(turns % n + b', "case": 1}' for n in range(rows)))
    tokens = renderer.tokenise(chunk)
    stream = io.BytesIO()
    write_tokens(stream, tokens)
    stream.seek(0)
    back = read_tokens(stream)
    for name, dtype in ARRAYS.items():
        assert getattr(back, name).dtype == dtype
        assert np.array_equal(getattr(back, name), getattr(tokens, name))
    assert back.findings == tokens.findings
    assert back.answers == tokens.answers


def test_processes_give_the_same_tokens_in_the_same_order(tmp_path, settings):
    rows = [chat_row(n, turns=1 + n % 3) for n in range(1, 300)]
    rows[40] = {"messages": []}
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    config = DataConfig(path=path)
    one, other = (
        tokenise(config, path, settings, Preparation(workers=workers, is_deep=True))
        for workers in (0, 2)
    )
    assert one.fingerprint == other.fingerprint
    assert one.findings == other.findings
    assert np.array_equal(one.content_keys, other.content_keys)
    assert np.array_equal(one.texts.signatures, other.texts.signatures)
    assert one.texts.languages == other.texts.languages


def test_a_process_that_was_ended_is_an_error(settings, monkeypatch):
    job = Job(settings=settings, train_on="assistant")
    with WorkerPool(job, 1) as pool:
        pool._groups[0].stop()
        with pytest.raises(DataError) as caught:
            list(pool.map([make_chunk(b"{}", b"{}")]))
    assert caught.value.findings[0].code == "data.rendering_limit"
    assert "lines 1 to 2" in caught.value.message


def test_a_process_that_hangs_is_an_error(settings, monkeypatch):
    monkeypatch.setattr(pools, "CHUNK_SECONDS", 0.0)
    job = Job(settings=settings, train_on="assistant")
    with WorkerPool(job, 1) as pool, pytest.raises(DataError, match="did not end"):
        list(pool.map([make_chunk(b"{}")]))


def test_a_bug_in_a_process_is_shown_as_one(settings):
    broken = Job(settings=settings, train_on="nobody")
    with WorkerPool(broken, 1) as pool, pytest.raises(RuntimeError, match="Traceback"):
        list(pool.map([make_chunk(b"{}")]))


def test_leaving_early_ends_the_processes(settings):
    job = Job(settings=settings, train_on="assistant")
    with WorkerPool(job, 2) as pool:
        next(pool.map(make_chunk(b"{}") for _ in range(50)))
        processes = _processes(pool)
        assert len(processes) == 2
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def _processes(pool):
    first = [psutil.Process(group.process.pid) for group in pool._groups]
    return [*first, *(fork for process in first for fork in process.children())]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_one_of_several_processes_that_is_killed_is_noticed(settings, victim):
    job = Job(settings=settings, train_on="assistant")
    with WorkerPool(job, 3) as pool:
        chunks = pool.map(make_chunk(b"{}") for _ in range(500))
        next(chunks)
        processes = _processes(pool)
        assert len(processes) == 3
        processes[victim].kill()
        with pytest.raises(DataError, match="did not end"):
            list(chunks)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_processes_end_with_the_one_that_started_them(tmp_path, settings):
    job = tmp_path / "job.json"
    write_json(job, Job(settings=settings, train_on="assistant"))
    code = f"""
import json, os, signal
from pathlib import Path
from eightgig.data.chunks import Job
from eightgig.data.pool import WorkerPool
from eightgig.run import from_json
from tests.unit.data.test_pool import _processes, make_chunk
pool = WorkerPool(from_json(Job, json.loads(Path({str(job)!r}).read_text())), 2)
next(pool.map(make_chunk(b"{{}}") for _ in range(5)))
print(*(process.pid for process in _processes(pool)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of shared memory")
def test_the_memory_of_a_tokenizer_is_shared(settings):
    # A large tokenizer, so that what a process of its own would take shows.
    entries = {f"word{number:06d}": number for number in range(200_000)}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="word000000"))
    tokenizer.pre_tokenizer = Whitespace()
    settings = replace(settings, tokenizer_json=tokenizer.to_str())
    job = Job(settings=settings, train_on="assistant")
    taken = []
    for count in (1, 4):
        with WorkerPool(job, count) as pool:
            list(pool.map(make_chunk(b"{}") for _ in range(4 * count)))
            taken.append(sum(_private_bytes(process.pid) for process in _processes(pool)))
    assert taken[1] < 2 * taken[0]


def _private_bytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return int(sizes["Pss_Anon"]) * 1024


def test_many_cores_do_not_mean_as_many_tokenizers(tmp_path, settings, monkeypatch):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    sources = (Source(name=str(path), kind="jsonl"),)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert prepare._count_workers(sources, settings) == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert prepare._count_workers(sources, settings) == 2
