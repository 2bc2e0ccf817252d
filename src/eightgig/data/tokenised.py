"""Rows as tokens, and collecting them: arrays in memory, or files that are then mapped."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightgig.data.batches import IGNORE_INDEX
from eightgig.data.cache import ArrayWriter
from eightgig.data.chunks import Chunk, ChunkTokens
from eightgig.data.formats import Format
from eightgig.data.rules import KEPT_FINDINGS
from eightgig.data.sources import Source
from eightgig.errors import Finding, Severity

TOKEN_ARRAYS: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "input_ids": np.int32,
        "labels": np.int32,
        "lengths": np.int64,
        "origins": np.int64,
        "lines": np.int64,
        "content_keys": np.uint64,
        "group_keys": np.uint64,
    }
)
"""The arrays of `Tokenised` with their types."""

# Errors that are true of every row, as the model and not the row is at fault.
_OF_THE_MODEL = frozenset({"data.no_template", "data.no_end_of_turn"})
_KEPT_ANSWERS = 10_000
_NO_IDS = np.zeros(0, np.int32)


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
        answer_keys: Hash of the answers of each row, (rows,), uint64; 0 where there is none.
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


class TokenStore:
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
            # Without the tokens, which are written already.
            self._texts.append(
                replace(tokens, input_ids=_NO_IDS, is_trained=_NO_IDS.astype(np.bool_), findings=())
            )
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

    def close(self) -> None:
        """Write what is not yet written.

        Raises:
            DataError: The disk is full, or fails.
        """
        self._writer.close()

    def finish(self, folder: Path | None = None) -> Tokenised:
        """All of it, once it is closed.

        Args:
            folder: Where the files lie now, if they were moved.
        """
        arrays: dict[str, Any] = {
            name: self._writer.array(name, dtype, folder) for name, dtype in TOKEN_ARRAYS.items()
        }
        return Tokenised(
            **arrays,
            sources=tuple(self._sources),
            findings=self.findings,
            counts=self.counts,
            fingerprint=self.fingerprint,
            texts=_join_texts(self._texts) if self._texts else None,
        )

    @property
    def sources(self) -> tuple[SourceRows, ...]:
        """The sources that were closed."""
        return tuple(self._sources)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was noticed, in order."""
        # Reading runs ahead of rendering: findings are put back into the order of the lines.
        ordered = sorted(self._findings, key=lambda found: (found[0], found[1].line or 0))
        return _gather([finding for _, finding in ordered], self._counts)

    @property
    def counts(self) -> dict[str, int]:
        """How often each code was noticed."""
        return {code: 1 if code in _OF_THE_MODEL else n for code, n in self._counts.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens."""
        return self._writer.fingerprint("input_ids", "labels", "lengths")

    @property
    def has_errors(self) -> bool:
        """Whether a row cannot be trained on."""
        return any(finding.severity == "error" for _, finding in self._findings)


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
            gathered.append(replace(finding, message=finding.message + also))
    return tuple(gathered)


def _join_texts(parts: Sequence[ChunkTokens]) -> TextFacts:
    scripts: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    answers: dict[str, str] = {}
    for part in parts:
        scripts.update(part.scripts)
        languages.update(part.languages)
        if len(answers) < _KEPT_ANSWERS:
            answers.update(part.answers)
    return TextFacts(
        answer_keys=np.concatenate([part.answer_keys for part in parts]),
        signatures=np.concatenate([part.signatures for part in parts]),
        answers=answers,
        scripts=dict(scripts),
        languages=dict(languages),
    )
