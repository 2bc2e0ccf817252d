"""Several processes that render chunks, with results in the order of the chunks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self, cast

import eightgig
from eightgig.data.chunks import (
    Chunk,
    ChunkTokens,
    Job,
    read_tokens,
    write_chunk,
    write_message,
)
from eightgig.data.rules import make_finding
from eightgig.errors import DataError
from eightgig.run.records import to_json

CHUNK_SECONDS = 300.0


class WorkerFailed(Exception):
    """A process ended without a result; the text is what it said last."""


class _Worker:
    """One process."""

    def __init__(self, job: Job) -> None:
        # A file and not a pipe, which would have to be emptied.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        root = str(Path(eightgig.__file__).parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "eightgig.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1",
                 "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._job: Job | None = job

    def tokenise(self, chunk: Chunk) -> ChunkTokens:
        """What the process makes of `chunk`.

        Raises:
            WorkerFailed: The process ended.
        """
        try:
            if self._job is not None:
                write_message(self._input, to_json(self._job), ())
                self._job = None
            write_chunk(self._input, chunk)
            tokens = read_tokens(cast("IO[bytes]", self._process.stdout))
        except BrokenPipeError:
            tokens = None
        if tokens is None:
            raise WorkerFailed(self._last_words())
        return tokens

    @property
    def _input(self) -> IO[bytes]:
        return cast("IO[bytes]", self._process.stdin)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-4_000:]

    def stop(self) -> None:
        """End the process now."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a stopped process."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._process.wait()


class WorkerPool:
    """`count` processes for one job; use it in a `with` statement."""

    def __init__(self, job: Job, count: int) -> None:
        self._workers = [_Worker(job) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="eightgig-data")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        """Each of `chunks` with its tokens, in order; only some are read ahead.

        Raises:
            DataError: A process was ended by the system, or hangs.
        """
        waiting: deque[tuple[Chunk, Future[ChunkTokens]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._tokenise, chunk)))
            if len(waiting) > 2 * len(self._workers):
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _tokenise(self, chunk: Chunk) -> ChunkTokens:
        worker = self._idle.get()
        try:
            return worker.tokenise(chunk)
        finally:
            self._idle.put(worker)

    def _next(self, waiting: deque[tuple[Chunk, Future[ChunkTokens]]]) -> tuple[Chunk, ChunkTokens]:
        chunk, future = waiting.popleft()
        try:
            return chunk, future.result(timeout=CHUNK_SECONDS)
        except (WorkerFailed, FutureTimeout) as error:
            if "Traceback" in str(error):
                raise RuntimeError(f"a data worker failed:\n{error}") from error
            raise _stopped(chunk) from error


def _stopped(chunk: Chunk) -> DataError:
    first, last = chunk.rows[0].line, chunk.rows[-1].line
    message = f"Rendering the rows at lines {first:,} to {last:,} did not end."
    finding = make_finding("data.rendering_limit", message, file=chunk.file, line=first)
    return DataError(
        f"{finding.place}{message}", why=finding.why, fix=finding.fix, findings=[finding]
    )
