"""All that can be said about a data set before it is trained on.

Rows are checked where they are read and rendered; here is what only all rows together show:
repetitions, leaks into the held-out rows, lengths, answers, stop tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eightgig.config import DataConfig
from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.data.load import RowSplit, make_dataset, split_rows
from eightgig.data.near import similar_rows
from eightgig.data.prepare import Preparation, Progress, tokenise
from eightgig.data.preview import PreviewRow, preview_rows
from eightgig.data.rules import RULES, make_finding
from eightgig.data.select import (
    SHOWN_ROWS,
    count_trained,
    find_long_rows,
    row_blocks,
    rows_left,
)
from eightgig.data.tokenised import TextFacts, Tokenised
from eightgig.data.tokenizer import render_settings, stop_ids
from eightgig.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HISTOGRAM_EDGES = (0, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
_ANSWERS_TO_JUDGE = 20
_DOMINANT_SHARE = 0.7
_FREQUENT_SHARE = 0.2
_FREE_ANSWERS = 50
_FEW_TOKENS = 1_000
_SMALL_SHARE = 0.01
_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What `eightgig check` says.

    Attributes:
        findings: Errors first, then warnings and notes; of each code what is true of all rows
            first, then rows in order.
        summary: Counts and facts: `counts` (code -> number), `format`, `files`, `rows`, `tokens`,
            `trained_share`, `histogram`, `scripts`, `languages`, `answers`.
        preview: Some rendered rows.
    """

    findings: tuple[Finding, ...]
    summary: Mapping[str, Any]
    preview: tuple[PreviewRow, ...]

    @property
    def has_errors(self) -> bool:
        """Whether the data cannot be trained on."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def has_warnings(self) -> bool:
        """Whether `--strict` refuses the data."""
        return any(finding.severity == "warning" for finding in self.findings)


def check_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 42,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> DataReport:
    """Look at every row of `config`; never raises because of what is in them.

    Args:
        config: The group `data`; rows are measured against `max_length` where it is a number.
        tokenizer: From `load_tokenizer`.
        seed: `train.seed`; it fixes which rows are held out.
        cache_dir: Folder where tokens are left for the training; None keeps them in memory.
        progress: Called with the rows done, and the share of all.
        workers: Processes that render; None chooses, 0 renders in this process.
    """
    settings = render_settings(tokenizer, config.chat_template)
    preparation = Preparation(cache_dir=cache_dir, progress=progress, workers=workers, is_deep=True)
    try:
        tokens = tokenise(config, config.path, settings, preparation)
        other = (
            tokenise(config, config.held_out_path, settings, preparation)
            if config.held_out_path is not None
            else None
        )
        split = split_rows(tokens, other, config, seed=seed)
    except DataError as error:
        return DataReport(findings=_findings_of(error), summary={"counts": {}}, preview=())
    rows = make_dataset(tokens)
    limit = config.max_length
    # How many rows there are of what names only some.
    noticed: dict[str, int] = {}
    found = [
        *tokens.findings,
        *(() if other is None else other.findings),
        *split.findings,
        *_find_repetitions(tokens, noticed),
        *_find_similar(tokens, split, noticed, is_split=other is None),
        *_find_answers(tokens.texts),
        *_find_amounts(rows, config),
        *(() if isinstance(limit, str) else find_long_rows(rows, limit, config.too_long)),
        *_find_stops(rows, tokenizer),
        *_find_template(settings.chat_template),
    ]
    trained = split.trained
    if not isinstance(limit, str) and config.too_long != "refuse":
        trained = np.intersect1d(trained, rows_left(rows, limit, config.too_long))
    if not tokens.count("error") and not len(trained):
        found.append(make_finding("data.no_rows", "No row is left to train on."))
    if not isinstance(limit, str):
        noticed["data.too_long"] = int(np.count_nonzero(rows.lengths > limit))
    return DataReport(
        findings=order_findings(found),
        summary=_summarise(tokens, rows, _count(found, tokens, other, noticed)),
        preview=preview_rows(rows, tokenizer),
    )


def _findings_of(error: DataError) -> tuple[Finding, ...]:
    if error.findings:
        return error.findings
    return (
        Finding(
            severity="error",
            code="data.template",
            message=error.message,
            why=error.why,
            fix=error.fix,
        ),
    )


def order_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """`findings` by severity and code; what is true of all rows first, then rows in order."""
    rank = {code: index for index, code in enumerate(RULES)}

    def place(finding: Finding) -> tuple[int, int, bool, str, int]:
        return (
            _SEVERITIES.index(finding.severity),
            rank.get(finding.code, len(rank)),
            finding.line is not None,
            finding.file or "",
            finding.line or 0,
        )

    return tuple(sorted(findings, key=place))


def _count(
    found: Sequence[Finding],
    tokens: Tokenised,
    other: Tokenised | None,
    noticed: Mapping[str, int],
) -> dict[str, int]:
    """How often each code was noticed, those that are not listed too."""
    # What is said of all rows together, in front of those that are named, is none of them.
    named = Counter(finding.code for finding in found if finding.line is not None)
    counts = {finding.code: named[finding.code] or 1 for finding in found}
    for part in (tokens, other):
        for code, number in () if part is None else part.counts.items():
            counts[code] = max(counts.get(code, 0), number)
    return {code: max(number, noticed.get(code, 0)) for code, number in counts.items()}


# What only all rows together show


def _find_repetitions(tokens: Tokenised, noticed: dict[str, int]) -> list[Finding]:
    rows = np.flatnonzero(tokens.content_keys)
    keys = tokens.content_keys[rows]
    _, first, of_row = np.unique(keys, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[of_row] != np.arange(len(rows)))
    if not len(repeated):
        return []
    noticed["data.duplicates"] = len(repeated)
    share = len(repeated) / len(rows)
    message = f"{len(repeated):,} of {len(rows):,} rows repeat earlier ones ({share:.1%})."
    findings = [make_finding("data.duplicates", message)]
    for index in repeated[:SHOWN_ROWS].tolist():
        file, line = tokens.place(int(rows[index]))
        former, at = tokens.place(int(rows[first[of_row[index]]]))
        where = f"line {at}" if former == file else f"{former}:{at}"
        text = f"The row says the same as {where}."
        findings.append(make_finding("data.duplicates", text, file=file, line=line))
    return findings


def _find_similar(
    tokens: Tokenised, split: RowSplit, noticed: dict[str, int], *, is_split: bool
) -> list[Finding]:
    if tokens.texts is None:
        return []
    later, earlier = similar_rows(tokens.texts.signatures, tokens.content_keys)
    if not len(later):
        return []
    noticed["data.near_duplicates"] = len(later)
    share = len(later) / int(np.count_nonzero(tokens.content_keys))
    message = f"{len(later):,} rows almost repeat earlier ones ({share:.1%})."
    findings = [make_finding("data.near_duplicates", message)]
    for row, former in list(zip(later.tolist(), earlier.tolist(), strict=True))[:SHOWN_ROWS]:
        file, line = tokens.place(row)
        source, at = tokens.place(former)
        where = f"line {at}" if source == file else f"{source}:{at}"
        text = f"The row says almost the same as {where}."
        findings.append(make_finding("data.near_duplicates", text, file=file, line=line))
    if is_split:
        held = np.unique(tokens.origins[split.held_out])
        across = np.isin(later, held) != np.isin(earlier, held)
        if across.any():
            number = int(across.sum())
            text = f"{number:,} held-out rows almost repeat rows that are trained on."
            findings.append(make_finding("data.held_out_near", text))
    return findings


def _find_answers(texts: TextFacts | None) -> list[Finding]:
    keys = None if texts is None else texts.answer_keys[texts.answer_keys != 0]
    if texts is None or keys is None or len(keys) < _ANSWERS_TO_JUDGE:
        return []
    found, counts = np.unique(keys, return_counts=True)
    top = int(counts.argmax())
    share = float(counts[top]) / len(keys)
    is_free = len(found) > _FREE_ANSWERS
    if share < (_FREQUENT_SHARE if is_free else _DOMINANT_SHARE):
        return []
    answer = texts.answers.get(str(int(found[top])), "a longer text")
    message = (
        f'{counts[top]:,} of {len(keys):,} answers are "{answer}" ({share:.0%}); there are '
        f"{len(found):,} different ones."
    )
    return [make_finding("data.dominant_answer", message)]


def _find_amounts(rows: Dataset, config: DataConfig) -> list[Finding]:
    if not rows.num_rows:
        return []
    trained, total = count_trained(rows), len(rows.input_ids)
    findings: list[Finding] = []
    if config.train_on == "all" and rows.summary.get("format") != "text":
        findings.append(make_finding("data.prompts_trained", "Prompts carry loss, too."))
    if trained < _FEW_TOKENS:
        message = f"Only {trained:,} tokens are trained."
        findings.append(make_finding("data.few_trained_tokens", message))
    if trained < _SMALL_SHARE * total:
        message = f"{trained / total:.2%} of the tokens are trained."
        findings.append(make_finding("data.small_trained_share", message))
    return findings


def _find_stops(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[Finding]:
    """Whether rows end with a token at which servers stop."""
    known = stop_ids(tokenizer)
    last = last_trained(rows)
    missed = last[~np.isin(last, list(known))]
    if not len(missed):
        return []
    tokens, counts = np.unique(missed, return_counts=True)
    token = int(tokens[counts.argmax()])
    name = tokenizer.convert_ids_to_tokens(token)
    message = f"{len(missed):,} rows end with {name} ({token}), which is no stop token here."
    return [make_finding("data.stop_token", message)]


def last_trained(dataset: Dataset) -> NDArray[np.int32]:
    """The last trained token of each row, (rows,)."""
    found = np.zeros(dataset.num_rows, np.int32)
    for rows in row_blocks(dataset.lengths):
        start, end = int(dataset.offsets[rows.start]), int(dataset.offsets[rows.stop])
        places = np.flatnonzero(dataset.labels[start:end] != IGNORE_INDEX)
        behind = np.searchsorted(places, dataset.offsets[rows.start + 1 : rows.stop + 1] - start)
        found[rows] = dataset.input_ids[start:end][places[behind - 1]]
    return found


def _find_template(template: str | None) -> list[Finding]:
    if template is None or "strftime_now" not in template:
        return []
    return [make_finding("data.dated_template", "The chat template writes the date of today.")]


# Facts


def _summarise(tokens: Tokenised, dataset: Dataset, counts: Mapping[str, int]) -> dict[str, Any]:
    lengths = dataset.lengths
    total = max(1, len(dataset.input_ids))
    return {
        **dataset.summary,
        "counts": dict(counts),
        "source_rows": len(tokens.lines),
        "good_rows": int(np.count_nonzero(tokens.content_keys)),
        "trained_share": dataset.summary["trained_tokens"] / total,
        "histogram": histogram(lengths),
        "percentiles": {
            f"p{share}": int(np.percentile(lengths, share)) if len(lengths) else 0
            for share in (50, 90, 99)
        },
        **_summarise_texts(tokens.texts),
    }


def histogram(lengths: NDArray[np.int64]) -> list[dict[str, int | None]]:
    """Rows per range of tokens: `from`, `below` (None: no end) and `rows`; empty ends left out."""
    edges = np.array(_HISTOGRAM_EDGES)
    counts = np.bincount(
        np.searchsorted(edges, lengths, side="right") - 1, minlength=len(edges)
    ).tolist()
    ends = [*_HISTOGRAM_EDGES[1:], None]
    bars: list[dict[str, int | None]] = [
        {"from": start, "below": end, "rows": count}
        for start, end, count in zip(_HISTOGRAM_EDGES, ends, counts, strict=True)
    ]
    while bars and not bars[-1]["rows"]:
        bars.pop()
    return bars


def _summarise_texts(texts: TextFacts | None) -> dict[str, Any]:
    if texts is None:
        return {}
    letters = max(1, sum(texts.scripts.values()))
    rows = max(1, sum(texts.languages.values()))
    keys, counts = np.unique(texts.answer_keys[texts.answer_keys != 0], return_counts=True)
    top = np.argsort(-counts, kind="stable")[:10]
    return {
        "scripts": _shares(texts.scripts, letters),
        "languages": _shares({name or "?": n for name, n in texts.languages.items()}, rows),
        "different_answers": len(keys),
        "answers": [
            {"answer": texts.answers.get(str(int(keys[index]))), "rows": int(counts[index])}
            for index in top.tolist()
            if counts[index] > 1
        ],
    }


def _shares(counts: Mapping[str, int], total: int) -> dict[str, float]:
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return {name: count / total for name, count in ordered}
