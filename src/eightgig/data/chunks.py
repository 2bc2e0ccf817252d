"""Some rows at a time, from bytes to tokens: the work that processes share, and how it travels.

Between processes go lengths, JSON and raw arrays; nothing that could be anything else than data.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eightgig.data.formats import Example, RowShape, read_example
from eightgig.data.layout import RenderedRow
from eightgig.data.near import SIGNATURE_SIZE
from eightgig.data.parse import parse_row
from eightgig.data.raw import RawRow
from eightgig.data.render import Renderer, TrainOn
from eightgig.data.rules import Notes
from eightgig.data.texts import RowText, describe_text, hash_text
from eightgig.data.tokenizer import RenderSettings
from eightgig.data.turns import texts_of
from eightgig.errors import Finding
from eightgig.run import from_json, to_json

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is done to every row.

    Attributes:
        settings: Tokenizer and template.
        train_on: `data.train_on`.
        is_deep: Whether texts are looked at, too: similarity, placeholders, secrets.
        boilerplate: Hashes of what many rows share, left out of similarity.
    """

    settings: RenderSettings
    train_on: TrainOn
    is_deep: bool = False
    boilerplate: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows of one file, one behind the other."""

    file: str
    shape: RowShape
    rows: tuple[RawRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTokens:
    """What became of a chunk.

    Attributes:
        input_ids: Token ids of all rendered rows, (total,), int32.
        is_trained: Which of them are trained, (total,), bool.
        lengths: Tokens of each rendered row, (rendered,), int64.
        origins: Index in the chunk of the row each was rendered from, (rendered,), int64.
        content_keys: Hash of what each row of the chunk says, (rows,), uint64; 0 if it has errors.
        group_keys: Hash of its group, or of what it says, (rows,), uint64.
        answer_keys: Hash of its answers, (rows,), uint64; deep jobs only.
        signatures: Its MinHash signature, (rows, SIGNATURE_SIZE), uint32; deep jobs only.
        findings: In the order of the rows.
        answers: Short answers by their hash, as text; deep jobs only.
        scripts: Letters per script; deep jobs only.
        languages: Rows per language; deep jobs only.
    """

    input_ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    origins: NDArray[np.int64]
    content_keys: NDArray[np.uint64]
    group_keys: NDArray[np.uint64]
    answer_keys: NDArray[np.uint64]
    signatures: NDArray[np.uint32]
    findings: tuple[Finding, ...]
    answers: Mapping[str, str]
    scripts: Mapping[str, int]
    languages: Mapping[str, int]


ARRAYS: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "is_trained": np.bool_,
    "lengths": np.int64,
    "origins": np.int64,
    "content_keys": np.uint64,
    "group_keys": np.uint64,
    "answer_keys": np.uint64,
    "signatures": np.uint32,
}
"""The arrays of `ChunkTokens` with their types."""


class ChunkRenderer:
    """Turns chunks into tokens.

    Args:
        job: What is done to every row.
        memory_bytes: What rendering one row may take beyond what the process has; None: anything.

    Raises:
        DataError: The chat template is no valid Jinja.
    """

    def __init__(self, job: Job, *, memory_bytes: int | None = None) -> None:
        self._job = job
        self._renderer = Renderer(job.settings, memory_bytes=memory_bytes)
        self._boilerplate = np.array(job.boilerplate, np.uint64)

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ChunkTokens]]:
        """Each of `chunks` with its tokens, in order."""
        return ((chunk, self.tokenise(chunk)) for chunk in chunks)

    def tokenise(self, chunk: Chunk) -> ChunkTokens:
        """Parse, check and render the rows of `chunk`."""
        rendered: list[RenderedRow] = []
        origins: list[int] = []
        findings: list[Finding] = []
        keys = np.zeros((3, len(chunk.rows)), np.uint64)
        size = SIGNATURE_SIZE if self._job.is_deep else 0
        signatures = np.zeros((len(chunk.rows), size), np.uint32)
        texts: list[RowText] = []
        for index, row in enumerate(chunk.rows):
            notes = Notes(file=chunk.file, line=row.line)
            parsed = parse_row(row, notes)
            example = None if parsed is None else read_example(parsed, chunk.shape, notes)
            rows: tuple[RenderedRow, ...] = ()
            if example is not None:
                rows = self._renderer.render(example, notes, train_on=self._job.train_on)
            if example is not None and self._job.is_deep:
                text = describe_text(example, self._boilerplate, notes)
                texts.append(text)
                keys[2, index] = text.answer_key
                signatures[index] = text.signature
            findings.extend(notes.findings)
            if example is None or notes.has_error:
                continue
            rendered.extend(rows)
            origins.extend([index] * len(rows))
            keys[0, index] = content_key(example)
            keys[1, index] = keys[0, index] if example.group is None else hash_text(example.group)
        return ChunkTokens(
            input_ids=join([row.input_ids for row in rendered], np.int32),
            is_trained=join([row.is_trained for row in rendered], np.bool_),
            lengths=np.array([len(row.input_ids) for row in rendered], np.int64),
            origins=np.array(origins, np.int64),
            content_keys=keys[0],
            group_keys=keys[1],
            answer_keys=keys[2],
            signatures=signatures,
            findings=tuple(findings),
            answers={str(text.answer_key): text.answer for text in texts if text.answer},
            scripts=_sum_counts([text.scripts for text in texts]),
            languages=_sum_counts([{text.language: 1} for text in texts]),
        )


def _sum_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(total)


def content_key(example: Example) -> int:
    """Hash of what a row says, whatever its blanks and letter case; never 0."""
    said: list[object] = [_normal(example.text)] if example.text is not None else []
    for message in example.messages:
        texts = [_normal(text) for text in texts_of(message)]
        said.append((message["role"], texts, message.get("tool_calls")))
    return hash_text(json.dumps(said, ensure_ascii=False, default=str))


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def join(parts: Sequence[NDArray[ScalarT]], dtype: type[ScalarT]) -> NDArray[ScalarT]:
    """`parts` one behind the other; empty if there are none."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def write_message(
    stream: IO[bytes], header: Mapping[str, Any], parts: Sequence[bytes | memoryview]
) -> None:
    """Write a JSON header and raw parts to `stream`, so that `read_message` finds their ends."""
    sizes = [memoryview(part).nbytes for part in parts]
    data = json.dumps({**header, "sizes": sizes}).encode("utf-8")
    stream.write(_LENGTH.pack(len(data)) + data)
    for part in parts:
        stream.write(part)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next header and parts of `stream`; None where it ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    header = json.loads(stream.read(_LENGTH.unpack(head)[0]))
    return header, [stream.read(size) for size in header.pop("sizes")]


_LENGTH = struct.Struct("<Q")


def write_chunk(stream: IO[bytes], chunk: Chunk) -> None:
    """Send `chunk` to another process."""
    lines = [row.line for row in chunk.rows]
    header = {"file": chunk.file, "shape": to_json(chunk.shape), "lines": lines}
    write_message(stream, header, [row.data for row in chunk.rows])


def read_chunk(stream: IO[bytes]) -> Chunk | None:
    """The next chunk that was sent; None where there is none."""
    message = read_message(stream)
    if message is None:
        return None
    header, parts = message
    rows = zip(header["lines"], parts, strict=True)
    return Chunk(
        file=header["file"],
        shape=from_json(RowShape, header["shape"]),
        rows=tuple(RawRow(line=line, data=data) for line, data in rows),
    )


def write_tokens(stream: IO[bytes], tokens: ChunkTokens) -> None:
    """Send `tokens` to another process."""
    header = {
        "findings": [to_json(finding) for finding in tokens.findings],
        "answers": tokens.answers,
        "scripts": tokens.scripts,
        "languages": tokens.languages,
    }
    write_message(stream, header, [getattr(tokens, name).tobytes() for name in ARRAYS])


def read_tokens(stream: IO[bytes]) -> ChunkTokens | None:
    """The next tokens that were sent; None where there are none."""
    message = read_message(stream)
    if message is None:
        return None
    header, parts = message
    arrays: dict[str, Any] = {
        name: np.frombuffer(data, dtype)
        for (name, dtype), data in zip(ARRAYS.items(), parts, strict=True)
    }
    rows = len(arrays["content_keys"])
    arrays["signatures"] = arrays["signatures"].reshape(rows, -1 if rows else SIGNATURE_SIZE)
    header["findings"] = tuple(from_json(Finding, finding) for finding in header["findings"])
    return ChunkTokens(**arrays, **header)
