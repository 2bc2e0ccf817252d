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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.config import DataConfig
from eightgig.data.cache import (
    ArrayWriter,
    content_digest,
    make_key,
    map_array,
    publish,
    read_manifest,
)
from eightgig.data.chunks import Chunk, ChunkRenderer, Job
from eightgig.data.formats import (
    Example,
    Format,
    RowShape,
    check_columns,
    describe_columns,
    detect_format,
    read_example,
)
from eightgig.data.near import common_pieces, piece_hashes
from eightgig.data.parse import parse_row
from eightgig.data.pool import WorkerPool
from eightgig.data.raw import RawRow
from eightgig.data.read import read_rows
from eightgig.data.rules import TEXT_CODES, Notes
from eightgig.data.sources import Source, find_sources, find_unused_split
from eightgig.data.template import ChatTemplate
from eightgig.data.texts import said_text
from eightgig.data.tokenised import TOKEN_ARRAYS, SourceRows, Tokenised, TokenStore
from eightgig.data.tokenizer import RenderSettings, settings_digest
from eightgig.errors import Finding
from eightgig.run.records import from_json, to_json
from eightgig.units import MIB

Progress = Callable[[int, float | None], None]
"""Called with the rows done so far, and the share of all bytes that they are (None: unknown)."""

# Google's templates for Gemma 4 of 2026-07-09; their rows may be rendered in this process.
_TRUSTED_TEMPLATES = frozenset(
    {
        "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
        "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
    }
)
_PROBE_ROWS = 200
_CHUNK_ROWS = 64
_CHUNK_BYTES = 1 << 20
_BYTES_PER_WORKER = MIB
# Each has a tokenizer of its own: a quarter of a GiB for Gemma's.
_MOST_WORKERS = 8


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
    if path == config.path:
        findings += find_unused_split(sources, config.split)
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
    store = TokenStore(findings, ArrayWriter(staging))
    count = preparation.workers
    if count is None:
        count = _count_workers(sources, settings)
    try:
        _fill(store, sources, config, job, count, preparation.progress)
        store.close()
    except BaseException:
        store.discard()
        raise
    if staging is None or target is None:
        return store.finish()
    if not store.has_errors and publish(staging, target, _manifest(store)):
        return store.finish(target)
    tokens = store.finish()
    # Mapped files can be read until they are closed, where the system lets them go at all.
    store.discard()
    return tokens


def _fill(
    store: TokenStore,
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
    cores = min(cores, _MOST_WORKERS)
    return cores if is_hub else max(1, min(cores, size_bytes // _BYTES_PER_WORKER))


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
    unread = check_columns(columns, name)
    if unread is not None:
        return unread
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
            return describe_columns(parsed[0][1], columns, name, parsed[0][0].line)
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


def _manifest(tokens: TokenStore) -> dict[str, Any]:
    """What `_read_cached` reads; of findings those that every preparation has, deep or not."""
    findings = [finding for finding in tokens.findings if finding.code not in TEXT_CODES]
    return {
        "sources": to_json(tokens.sources),
        "findings": to_json(findings),
        "counts": {code: n for code, n in tokens.counts.items() if code not in TEXT_CODES},
        "fingerprint": tokens.fingerprint,
    }


def _read_cached(folder: Path) -> Tokenised | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    arrays: dict[str, Any] = {
        name: map_array(folder / f"{name}.bin", dtype) for name, dtype in TOKEN_ARRAYS.items()
    }
    return Tokenised(
        **arrays,
        sources=tuple(from_json(SourceRows, source) for source in manifest["sources"]),
        findings=tuple(from_json(Finding, finding) for finding in manifest["findings"]),
        counts=manifest["counts"],
        fingerprint=manifest["fingerprint"],
    )
