"""Forgetting: loss on general text that has nothing to do with the training.

The shipped sample was written for this purpose (`general_text.txt`, under the licence of this
package), so that no model can know it by heart.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.data.control import ControlTokens, RenderedText
from eightgig.data.template import RenderingLimit
from eightgig.data.tokenizer import RenderSettings
from eightgig.errors import DataError, Finding
from eightgig.evaluation.loss import RowLosses
from eightgig.evaluation.records import Forgetting
from eightgig.evaluation.statistics import Paired, compare

SHIPPED = "shipped"
WORSE_BY = 0.05
"""Nats a token by which the loss must rise to be worth a warning."""

_MOST_BYTES = 4 << 20


def read_general_text(path: Path | None) -> tuple[str, ...]:
    """The paragraphs of a text file, which empty lines separate; None reads the shipped one.

    Raises:
        DataError: The file cannot be read, is too large, or holds no text.
    """
    source = path or Path(__file__).with_name("general_text.txt")
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _unusable(source, "it is no regular file")
        if status.st_size > _MOST_BYTES:
            raise _unusable(source, "it has more than 4 MiB; a sample is enough")
        with source.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES)  # files of /proc say that they have none
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(source, f"it cannot be read as UTF-8 text ({error})") from error
    paragraphs = [" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n")]
    found = tuple(filter(None, paragraphs))
    if not found:
        raise _unusable(source, "it is empty")
    return found


def general_rows(
    paragraphs: Sequence[str], settings: RenderSettings, *, max_length: int
) -> Dataset:
    """Paragraphs as rows whose every token carries loss, cut into pieces of `max_length`.

    Raises:
        DataError: The tokenizer gives up on a paragraph.
    """
    control = ControlTokens(settings.tokenizer_json, settings.chat_template or "")
    start = [] if settings.bos_id is None else [settings.bos_id]
    rows: list[list[int]] = []
    sources: list[int] = []
    for number, paragraph in enumerate(paragraphs):
        text = RenderedText(paragraph, control.typed_in(paragraph))
        try:
            found = control.encode(text).ids
        except RenderingLimit as error:
            raise DataError(
                f"Paragraph {number + 1} of the general text cannot be tokenised.",
                why=f"It says: {error}.",
                fix="Use the tokenizer of the model's publisher.",
            ) from error
        for piece in _pieces(found, max(1, max_length - len(start))):
            row = [*start, *piece]
            if len(row) > 1:  # nothing predicts the first token
                rows.append(row)
                sources.append(number)
    ids = np.array([token for row in rows for token in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    labels = ids.copy()
    labels[offsets[:-1]] = IGNORE_INDEX
    return Dataset(
        input_ids=ids,
        labels=labels,
        offsets=offsets,
        row_ids=np.array(sources, np.int64),
        fingerprint="",
        summary={},
    )


def compare_general(
    source: Path | None, rows: Dataset, base: RowLosses, tuned: RowLosses, *, seed: int
) -> Forgetting:
    """What the losses of `rows` say."""
    paired = Paired(
        first=base.sums,
        second=tuned.sums,
        weights=base.tokens.astype(np.float64),
        sources=rows.row_ids,
    )
    return Forgetting(
        source=SHIPPED if source is None else str(source),
        loss=compare("general_loss", paired, is_higher_better=False, margin=WORSE_BY, seed=seed),
        num_texts=len(np.unique(rows.row_ids)),
    )


def warn_of_forgetting(forgetting: Forgetting) -> Finding | None:
    """The warning, where the loss rose and that is no accident."""
    loss = forgetting.loss
    if loss.difference.value < WORSE_BY or loss.verdict != "worse":
        return None
    before, after = loss.first.value, loss.second.value
    return Finding(
        severity="warning",
        code="evaluation.forgetting",
        message=f"Loss on general text rose from {before:.3f} to {after:.3f} nats a token.",
        why="The model unlearns what it could do before; answers outside the task get worse.",
        fix="Train fewer epochs, with a lower train.learning_rate or lora.r, or mix general rows "
        "into the data.",
    )


def _pieces(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`ids` in pieces of about the same length."""
    count = max(1, -(-len(ids) // size))
    size = max(1, -(-len(ids) // count))
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot serve as general text: {reason}.",
        why="Forgetting is measured on paragraphs of text, with empty lines between them.",
        fix="Name another text file, or leave it out for the sample that eightgig brings.",
    )
