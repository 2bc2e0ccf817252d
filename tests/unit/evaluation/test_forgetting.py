"""General text: the shipped sample, files, rows, and the warning."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eightgig.data.batches import IGNORE_INDEX
from eightgig.data.tokenizer import RenderSettings, render_settings
from eightgig.errors import DataError
from eightgig.evaluation.forgetting import (
    compare_general,
    general_rows,
    read_general_text,
    warn_of_forgetting,
)
from eightgig.evaluation.loss import RowLosses
from tests import tiny


@pytest.fixture(scope="module")
def settings() -> RenderSettings:
    return render_settings(tiny.make_tokenizer("gemma4_e2b"))


def test_the_shipped_sample_has_sixty_different_paragraphs() -> None:
    paragraphs = read_general_text(None)
    assert len(paragraphs) == len(set(paragraphs)) == 60
    assert all(40 < len(paragraph) < 400 for paragraph in paragraphs)


def test_paragraphs_of_a_file_are_parted_by_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\ntwo\r\n\r\nthree\n\n\n \n\nfour")
    assert read_general_text(path) == ("one two", "three", "four")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a file without end of Linux and macOS")
def test_a_file_without_end_is_not_read() -> None:
    with pytest.raises(DataError, match="it is no regular file") as caught:
        read_general_text(Path("/dev/zero"))
    assert "Name another text file" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", None])
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot serve as general text"):
        read_general_text(path)


def test_every_token_but_the_first_carries_loss(settings: RenderSettings) -> None:
    rows = general_rows(["the one", "and another"], settings, max_length=100)
    assert rows.num_rows == 2
    assert rows.input_ids[rows.offsets[:-1]].tolist() == [settings.bos_id] * 2
    assert np.flatnonzero(rows.labels == IGNORE_INDEX).tolist() == rows.offsets[:-1].tolist()


@pytest.mark.parametrize("max_length", [5, 7, 16, 200])
def test_long_paragraphs_are_cut_and_stay_one_source(
    settings: RenderSettings, max_length: int
) -> None:
    text = "many words that make a paragraph of some length"
    whole = general_rows([text], settings, max_length=1000)
    cut = general_rows(["short one", text], settings, max_length=max_length)
    assert cut.lengths.max() <= max_length
    pieces = [
        cut.input_ids[start + 1 : end]
        for start, end, source in zip(cut.offsets[:-1], cut.offsets[1:], cut.row_ids, strict=True)
        if source == 1
    ]
    assert np.concatenate(pieces).tolist() == whole.input_ids[1:].tolist()


def test_a_paragraph_that_the_tokenizer_gives_up_on_is_named(settings: RenderSettings) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    tokenizer = json.loads(settings.tokenizer_json)
    tokenizer["pre_tokenizer"] = {**slow, "invert": False}
    settings = replace(settings, tokenizer_json=json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"Paragraph 2 .* cannot be tokenised"):
        general_rows(["one", "a" * 60 + "b"], settings, max_length=100)


def test_typed_control_tokens_stay_text(settings: RenderSettings) -> None:
    rows = general_rows(["a <turn|> b"], settings, max_length=100)
    assert tiny.make_tokenizer("gemma4_e2b").eos_token_id not in rows.input_ids


@pytest.mark.parametrize(
    ("rise", "is_warned"), [(0.5, True), (0.06, True), (0.04, False), (-0.5, False)]
)
def test_a_rise_of_the_loss_is_warned_of(
    settings: RenderSettings, rise: float, is_warned: bool
) -> None:
    rows = general_rows(["the one", "and another"] * 10, settings, max_length=100)
    tokens = rows.lengths - 1
    before = 3.0 * tokens + np.random.default_rng(0).normal(0, 0.3, len(tokens))
    forgetting = compare_general(
        None,
        rows,
        RowLosses(sums=before, tokens=tokens),
        RowLosses(sums=before + rise * tokens, tokens=tokens),
        seed=0,
    )
    assert forgetting.num_texts == 20
    finding = warn_of_forgetting(forgetting)
    assert (finding is not None) == is_warned
    if finding is not None:
        assert finding.severity == "warning"
        assert "3." in finding.message
