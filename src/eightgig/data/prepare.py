"""From `data.path` to tokens: all rows, read, checked and rendered once.

Rows are handed in chunks to where they are rendered; their tokens are appended to arrays in
memory, or to files that are then mapped. Tokens of former runs are found again by the content of
the files and all that decides about tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightgig.config import DataConfig
from eightgig.data.batches import IGNORE_INDEX
from eightgig.data.cache import (
    ArrayWriter,
    content_digest,
    make_key,
    map_array,
    publish,
    read_manifest,
)
from eightgig.data.chunks import Chunk, ChunkRenderer, ChunkTokens, Job
from eightgig.data.formats import (
    Example,
    Format,
    RowShape,
    describe_columns,
    detect_format,
    read_example,
)
from eightgig.data.near import common_pieces, piece_hashes
from eightgig.data.parse import parse_row
from eightgig.data.pool import WorkerPool
from eightgig.data.read import RawRow, read_rows
from eightgig.data.rules import Notes
from eightgig.data.sources import Source, find_sources
from eightgig.data.template import ChatTemplate
from eightgig.data.texts import said_text
from eightgig.data.tokenizer import RenderSettings, settings_digest
from eightgig.errors import Finding, Severity
from eightgig.run.records import from_json, to_json
from eightgig.units import MIB

Progress = Callable[[int, float | None], None]
"""Called with the rows done so far, and the share of all bytes that they are (None: unknown)."""

KEPT_FINDINGS = 100
"""Findings of one code that are kept; the others are counted."""

# Google's templates for Gemma 4 of 2026-07-09; their rows may be rendered in this process.
_TRUSTED_TEMPLATES = frozenset(
    {
        "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
        "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
    }
)
# Errors that are true of every row, as the model and not the row is at fault.
_OF_THE_MODEL = frozenset({"data.no_template", "data.no_end_of_turn"})
_PROBE_ROWS = 200
_CHUNK_ROWS = 64
_CHUNK_BYTES = 1 << 20
_BYTES_PER_WORKER = MIB

_TOKEN_ARRAYS: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "labels": np.int32,
    "lengths": np.int64,
    "origins": np.int64,
    "lines": np.int64,
    "content_keys": np.uint64,
    "group_keys": np.uint64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRows:
    """One source, as it was read.

    Attributes:
        name: Path or name.
        format: Shape of its rows.
        first_row: Number of its first row among the rows of all sources.
        num_rows: Its rows, those with errors too.
    """

    name: str
    format: Format
    first_row: int
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What the texts of all rows look like.

    Attributes:
        answer_keys: Hash of the last answer of each row, (rows,), uint64; 0 where there is none.
        signatures: MinHash signature of each row, (rows, SIGNATURE_SIZE), uint32.
        answers: Short answers by their hash.
        scripts: Letters per script.
        languages: Rows per language; "" where it is not known.
    """

    answer_keys: NDArray[np.uint64]
    signatures: NDArray[np.uint32]
    answers: Mapping[str, str]
    scripts: Mapping[str, int]
    languages: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenised:
    """All rows as tokens; rows with errors have none.

    Attributes:
        input_ids: (total,), int32.
        labels: `input_ids` where trained, else IGNORE_INDEX, (total,), int32.
        lengths: Tokens of each rendered row, (rendered,), int64.
        origins: Number of the row each was rendered from, (rendered,), int64.
        lines: Line of each row in its source, (rows,), int64.
        content_keys: Hash of what each row says, (rows,), uint64; 0 where it has errors.
        group_keys: Hash of its group, (rows,), uint64.
        sources: Where rows came from, in order.
        findings: What was noticed, in order; of each code the first ones.
        counts: How often each code was noticed.
        fingerprint: Hash of the tokens.
        texts: What texts look like, where that was asked for.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int64]
    origins: NDArray[np.int64]
    lines: NDArray[np.int64]
    content_keys: NDArray[np.uint64]
    group_keys: NDArray[np.uint64]
    sources: tuple[SourceRows, ...]
    findings: tuple[Finding, ...]
    counts: Mapping[str, int]
    fingerprint: str
    texts: TextFacts | None = None

    def count(self, severity: Severity) -> int:
        """Findings of a severity, those that were not kept too."""
        severities = {finding.code: finding.severity for finding in self.findings}
        return sum(n for code, n in self.counts.items() if severities[code] == severity)

    def place(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        source = next(s for s in self.sources if row < s.first_row + s.num_rows)
        return source.name, int(self.lines[row])


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """How rows are prepared; nothing here changes their tokens.

    Attributes:
        cache_dir: Folder for tokens of this and former runs; None keeps them in memory.
        progress: Called from time to time.
        workers: Processes that render; None chooses, 0 renders in this process.
        is_deep: Whether texts are looked at, too.
    """

    cache_dir: Path | None = None
    progress: Progress | None = None
    workers: int | None = None
    is_deep: bool = False


def tokenise(
    config: DataConfig,
    path: str | tuple[str, ...],
    settings: RenderSettings,
    preparation: Preparation,
) -> Tokenised:
    """Every row that `path` names, as tokens.

    Args:
        config: How rows are read and what is trained.
        path: `config.path` or `config.held_out_path`.
        settings: Tokenizer and template.
        preparation: Where and how.

    Raises:
        DataError: The chat template is no valid Jinja, rendering hangs, or the disk is full.
    """
    if settings.chat_template is not None:
        # Here and not only where rows are rendered: a template that is no template is no bug.
        ChatTemplate(settings.chat_template, settings.special_tokens)
    sources, findings = find_sources(path, split=config.split)
    target = _cache_folder(config, sources, settings, preparation.cache_dir)
    if target is not None and not preparation.is_deep:
        known = _read_cached(target)
        if known is not None:
            return known
    job = Job(
        settings=settings,
        train_on=config.train_on,
        is_deep=preparation.is_deep,
        boilerplate=_find_boilerplate(sources, config) if preparation.is_deep else (),
    )
    staging = None if target is None else target.with_name(f"{target.name}.{os.getpid()}.tmp")
    store = _Store(findings, ArrayWriter(staging))
    count = preparation.workers
    if count is None:
        count = _count_workers(sources, settings)
    try:
        _fill(store, sources, config, job, count, preparation.progress)
        tokens = store.finish()
    except BaseException:
        store.discard()
        raise
    if staging is None or target is None:
        return tokens
    if tokens.count("error") or not publish(staging, target, _manifest(tokens)):
        # Mapped files stay readable until they are closed.
        return tokens
    return _read_cached(target) or tokens


def _fill(
    store: _Store,
    sources: Sequence[Source],
    config: DataConfig,
    job: Job,
    workers: int,
    progress: Progress | None,
) -> None:
    """Render all rows into `store`."""
    total = _file_bytes(sources)
    with contextlib.ExitStack() as stack:
        render = (
            stack.enter_context(WorkerPool(job, workers)).map if workers else ChunkRenderer(job).map
        )
        for source in sources:
            for chunk, tokens in render(store.keep_findings(_read_chunks(source, config))):
                store.add(chunk, tokens)
                if progress is not None:
                    share = None if total is None else min(1.0, store.num_bytes / total)
                    progress(store.num_rows, share)
            store.close_source(source)


def _file_bytes(sources: Sequence[Source]) -> int | None:
    """Bytes of all `sources`; None where rows are not as long as the file."""
    plain = ("jsonl", "json", "csv", "tsv")
    if not all(source.kind in plain and source.name.endswith(source.kind) for source in sources):
        return None
    return max(1, sum(_size(source) for source in sources))


def _size(source: Source) -> int:
    try:
        return Path(source.name).stat().st_size
    except OSError:
        return 0


def _count_workers(sources: Sequence[Source], settings: RenderSettings) -> int:
    """Processes to render in; this one alone where there is little to do, and it is safe."""
    template = settings.chat_template
    digest = "" if template is None else hashlib.sha256(template.encode()).hexdigest()
    is_trusted = template is None or digest in _TRUSTED_TEMPLATES
    size_bytes = sum(_size(source) for source in sources)
    is_hub = any(source.kind == "datasets" for source in sources)
    if is_trusted and size_bytes < _BYTES_PER_WORKER and not is_hub:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    return cores if is_hub else max(1, min(cores, size_bytes // _BYTES_PER_WORKER))


class _Store:
    """Collects what becomes of chunks."""

    def __init__(self, findings: Iterable[Finding], writer: ArrayWriter) -> None:
        self._writer = writer
        self._findings: list[tuple[int, Finding]] = []
        self._counts: Counter[str] = Counter()
        self._sources: list[SourceRows] = []
        self._lines = array("q")
        self._format: Format | None = None
        self._texts: list[ChunkTokens] = []
        self.num_bytes = 0
        for finding in findings:
            self._keep(finding)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._lines)

    def keep_findings(self, items: Iterable[Chunk | Finding]) -> Iterator[Chunk]:
        """The chunks among `items`; findings are kept."""
        for item in items:
            if isinstance(item, Finding):
                self._keep(item)
            else:
                yield item

    def _keep(self, finding: Finding) -> None:
        self._counts[finding.code] += 1
        if self._counts[finding.code] <= KEPT_FINDINGS:
            self._findings.append((len(self._sources), finding))

    def add(self, chunk: Chunk, tokens: ChunkTokens) -> None:
        """Keep the tokens of `chunk`.

        Raises:
            DataError: The disk is full, or fails.
        """
        self._format = chunk.shape.format
        write = self._writer.append
        write("input_ids", tokens.input_ids)
        write("labels", np.where(tokens.is_trained, tokens.input_ids, np.int32(IGNORE_INDEX)))
        write("lengths", tokens.lengths)
        write("origins", tokens.origins + self.num_rows)
        write("lines", np.array([row.line for row in chunk.rows], np.int64))
        write("content_keys", tokens.content_keys)
        write("group_keys", tokens.group_keys)
        self._lines.extend(row.line for row in chunk.rows)
        self.num_bytes += sum(len(row.data) + 1 for row in chunk.rows)
        if tokens.signatures.size:
            self._texts.append(tokens)
        for finding in tokens.findings:
            self._keep(finding)

    def close_source(self, source: Source) -> None:
        """All rows of `source` were added."""
        first_row = sum(before.num_rows for before in self._sources)
        if self._format is not None:
            self._sources.append(
                SourceRows(
                    name=source.name,
                    format=self._format,
                    first_row=first_row,
                    num_rows=self.num_rows - first_row,
                )
            )
        self._format = None

    def discard(self) -> None:
        """Give up."""
        self._writer.discard()

    def finish(self) -> Tokenised:
        """All of it.

        Raises:
            DataError: The disk is full, or fails.
        """
        arrays: dict[str, Any] = {
            name: self._writer.finish(name, dtype) for name, dtype in _TOKEN_ARRAYS.items()
        }
        # Reading runs ahead of rendering: findings are put back into the order of the lines.
        ordered = sorted(self._findings, key=lambda found: (found[0], found[1].line or 0))
        findings = _gather([finding for _, finding in ordered], self._counts)
        counts = {code: 1 if code in _OF_THE_MODEL else n for code, n in self._counts.items()}
        return Tokenised(
            **arrays,
            sources=tuple(self._sources),
            findings=findings,
            counts=counts,
            fingerprint=self._writer.fingerprint("input_ids", "labels", "lengths"),
            texts=_join_texts(self._texts) if self._texts else None,
        )


def _gather(findings: Sequence[Finding], counts: Mapping[str, int]) -> tuple[Finding, ...]:
    """`findings` with one of each code that all rows share, which says how many there are."""
    gathered: list[Finding] = []
    seen: set[str] = set()
    for finding in findings:
        if finding.severity != "note" and finding.code not in _OF_THE_MODEL:
            gathered.append(finding)
        elif finding.code not in seen:
            seen.add(finding.code)
            count = counts[finding.code]
            also = "" if count == 1 else f" So it is with {count - 1:,} other rows."
            gathered.append(
                Finding(
                    severity=finding.severity,
                    code=finding.code,
                    message=finding.message + also,
                    why=finding.why,
                    fix=finding.fix,
                    file=finding.file,
                    line=finding.line,
                )
            )
    return tuple(gathered)


def _join_texts(parts: Sequence[ChunkTokens]) -> TextFacts:
    scripts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    answers: dict[str, str] = {}
    for part in parts:
        scripts.update(part.scripts)
        languages.update(part.languages)
        if len(answers) < 10_000:
            answers.update(part.answers)
    return TextFacts(
        answer_keys=np.concatenate([part.answer_keys for part in parts]),
        signatures=np.concatenate([part.signatures for part in parts]),
        answers=answers,
        scripts=dict(scripts),
        languages=dict(languages),
    )


def _read_chunks(source: Source, config: DataConfig) -> Iterator[Chunk | Finding]:
    """The rows of `source` in chunks, once their format is known."""
    rows = read_rows(source)
    first = list(itertools.islice(rows, _PROBE_ROWS))
    shape = _find_shape(first, source.name, config)
    if isinstance(shape, Finding):
        yield from (item for item in first if isinstance(item, Finding))
        yield shape
        return
    waiting: list[RawRow] = []
    waiting_bytes = 0
    for item in itertools.chain(first, rows):
        if isinstance(item, Finding):
            yield item
            continue
        waiting.append(item)
        waiting_bytes += len(item.data)
        if len(waiting) == _CHUNK_ROWS or waiting_bytes >= _CHUNK_BYTES:
            yield Chunk(file=source.name, shape=shape, rows=tuple(waiting))
            waiting, waiting_bytes = [], 0
    if waiting:
        yield Chunk(file=source.name, shape=shape, rows=tuple(waiting))


def _find_shape(
    first: Sequence[RawRow | Finding], name: str, config: DataConfig
) -> RowShape | Finding:
    """How rows are read; a finding if no format fits any of the first ones."""
    columns = config.columns or {}
    known: Format | None = None if config.format == "auto" else config.format
    if known is None:
        parsed = [
            (row, value)
            for row in first
            if isinstance(row, RawRow)
            and (value := parse_row(row, Notes(file=name, line=row.line))) is not None
        ]
        known = detect_format([value for _, value in parsed], columns)
        if known is None and parsed:
            return describe_columns(parsed[0][1], name, parsed[0][0].line)
    # Where not one row can be read, each says so itself; the format does not matter then.
    return RowShape(format=known or "messages", columns=columns, group_column=config.group_column)


def _find_boilerplate(sources: Sequence[Source], config: DataConfig) -> tuple[int, ...]:
    """Pieces of text that many of the first rows share."""
    samples = [
        piece_hashes(said_text(example))
        for source in sources[:1]
        for example in _first_examples(source, config)
    ]
    return tuple(int(piece) for piece in common_pieces(samples))


def _first_examples(source: Source, config: DataConfig) -> Iterator[Example]:
    first = list(itertools.islice(read_rows(source), _PROBE_ROWS))
    shape = _find_shape(first, source.name, config)
    if isinstance(shape, Finding):
        return
    for row in first:
        if isinstance(row, RawRow):
            notes = Notes(file=source.name, line=row.line)
            parsed = parse_row(row, notes)
            example = None if parsed is None else read_example(parsed, shape, notes)
            if example is not None:
                yield example


def _cache_folder(
    config: DataConfig,
    sources: tuple[Source, ...],
    settings: RenderSettings,
    cache_dir: Path | None,
) -> Path | None:
    """Where tokens of these sources are kept; None if they cannot be known again."""
    if cache_dir is None:
        return None
    content = content_digest(sources)
    if content is None:
        return None
    key = make_key(
        {
            "content": content,
            "settings": settings_digest(settings),
            "train_on": config.train_on,
            "format": config.format,
            "columns": dict(config.columns or {}),
            "group_column": config.group_column,
        }
    )
    return cache_dir / "tokens" / key


def _manifest(tokens: Tokenised) -> dict[str, Any]:
    return {
        "sources": to_json(tokens.sources),
        "findings": to_json(tokens.findings),
        "counts": dict(tokens.counts),
        "fingerprint": tokens.fingerprint,
    }


def _read_cached(folder: Path) -> Tokenised | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    arrays: dict[str, Any] = {
        name: map_array(folder / f"{name}.bin", dtype) for name, dtype in _TOKEN_ARRAYS.items()
    }
    return Tokenised(
        **arrays,
        sources=tuple(from_json(SourceRows, source) for source in manifest["sources"]),
        findings=tuple(from_json(Finding, finding) for finding in manifest["findings"]),
        counts=manifest["counts"],
        fingerprint=manifest["fingerprint"],
    )
