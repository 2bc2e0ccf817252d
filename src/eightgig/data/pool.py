"""Several processes that render chunks, with results in the order of the chunks."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
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
# Forks of a process share its memory. macOS' own libraries do not survive one; Windows has none.
_CAN_FORK = sys.platform == "linux"


class WorkerFailed(Exception):
    """A process ended without a result; the text is what it said last."""


class _Worker:
    """What renders in one process."""

    def __init__(self, group: _Group, into: IO[bytes], back: IO[bytes]) -> None:
        self._group = group
        self._into = into
        self._back = back

    def tokenise(self, chunk: Chunk) -> ChunkTokens:
        """What the process makes of `chunk`.

        Raises:
            WorkerFailed: The process ended.
        """
        try:
            self._group.send_job()
            write_chunk(self._into, chunk)
            tokens = read_tokens(self._back)
        except BrokenPipeError:
            tokens = None
        if tokens is None:
            raise WorkerFailed(self._group.last_words())
        return tokens

    def close(self) -> None:
        """Close both ends; the process has been stopped."""
        for stream in (self._into, self._back):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class _Group:
    """A process and forks of it: a tokenizer is parsed once, and its memory shared.

    Attributes:
        process: The first; it forks the others once it has the job.
        workers: All of them.
    """

    def __init__(self, job: Job, count: int) -> None:
        self._job: Job | None = job
        self._sending = threading.Lock()
        # A file and not a pipe, which would have to be emptied.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        root = str(Path(eightgig.__file__).parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        pipes = [(os.pipe(), os.pipe()) for _ in range(count - 1)]
        theirs = [(into[0], back[1]) for into, back in pipes]
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-P", "-m", "eightgig.data.worker",
             *(f"{into}:{back}" for into, back in theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=tuple(itertools.chain(*theirs)),
            process_group=0 if _CAN_FORK else None,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1",
                 "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for end in itertools.chain(*theirs):
            os.close(end)
        first = (cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout))
        others = [(os.fdopen(into[1], "wb"), os.fdopen(back[0], "rb")) for into, back in pipes]
        self.workers = tuple(_Worker(self, *ends) for ends in (first, *others))

    def send_job(self) -> None:
        """Tell the process what to do, before anything else reaches it."""
        with self._sending:
            job, self._job = self._job, None
            if job is not None:
                write_message(cast("IO[bytes]", self.process.stdin), to_json(job), ())

    def last_words(self) -> str:
        """The end of what the processes said of what went wrong."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-4_000:]

    def stop(self) -> None:
        """End the processes now."""
        if not _CAN_FORK:
            self.process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the end of stopped processes."""
        for worker in self.workers:
            worker.close()
        self._errors.close()
        self.process.wait()


class WorkerPool:
    """`count` processes for one job; use it in a `with` statement."""

    def __init__(self, job: Job, count: int) -> None:
        sizes = [count] if _CAN_FORK else [1] * count
        self._groups = [_Group(job, size) for size in sizes]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for group in self._groups:
            for worker in group.workers:
                self._idle.put(worker)
        self._count = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="eightgig-data")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for group in self._groups:
            group.stop()
        self._threads.shutdown(cancel_futures=True)
        for group in self._groups:
            group.close()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        """Each of `chunks` with its tokens, in order; only some are read ahead.

        Raises:
            DataError: A process was ended by the system, or hangs.
        """
        waiting: deque[tuple[Chunk, Future[ChunkTokens]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._tokenise, chunk)))
            if len(waiting) > 2 * self._count:
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
