"""Held-out rows as questions, and their texts."""

from collections.abc import Sequence

import numpy as np
import pytest

from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.evaluation.questions import TokenText, pick_questions, read_questions
from eightgig.training.null_adapter import shuffle_answers
from tests import tiny


def _rows(*rows: tuple[Sequence[int], str]) -> Dataset:
    """Rows of ids, and a mark for each: T where it is trained."""
    ids = [token for row, _ in rows for token in row]
    labels = [
        token if mark == "T" else IGNORE_INDEX
        for row, marks in rows
        for token, mark in zip(row, marks, strict=True)
    ]
    return Dataset(
        input_ids=np.array(ids, np.int32),
        labels=np.array(labels, np.int32),
        offsets=np.cumsum([0, *(len(row) for row, _ in rows)]).astype(np.int64),
        row_ids=np.arange(5, 5 + len(rows)),
        fingerprint="f",
        summary={},
    )


def test_a_question_is_what_stands_before_the_last_trained_answer() -> None:
    rows = _rows(([1, 2, 3, 4, 9, 8], "..TTT."), ([1, 2, 3, 9, 4, 5, 6, 9], "..TT..TT"))
    first, second = read_questions(rows)
    assert (first.row, first.source) == (0, 5)
    assert (first.prompt, first.answer) == ((1, 2), (3, 4, 9))
    assert (second.prompt, second.answer) == ((1, 2, 3, 9, 4, 5), (6, 9))


@pytest.mark.parametrize("marks", [".TTT", "TTTT", "...."])
def test_rows_without_a_prompt_or_an_answer_are_no_questions(marks: str) -> None:
    assert read_questions(_rows(([1, 2, 3, 4], marks))) == ()


@pytest.mark.parametrize(("most", "expected"), [(2, [0, 3]), (100, list(range(7))), (0, [])])
def test_questions_are_picked_over_the_whole(most: int, expected: list[int]) -> None:
    questions = read_questions(_rows(*[([1, 2, 3], "..T")] * 7))
    assert [question.row for question in pick_questions(questions, most)] == expected


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma3_text", "gemma4_12b"])
def test_the_last_turn_is_found_in_every_template(family: str) -> None:
    tokenizer = tiny.make_tokenizer(family)
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "What is\nthe user thinking?"},
    ]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text = TokenText(tokenizer, {tokenizer.eos_token_id})
    assert text.question(ids) == "What is\nthe user thinking?"


def test_an_answer_is_shown_without_its_stop() -> None:
    tokenizer = tiny.make_tokenizer("gemma4_e2b")
    ids = tokenizer(" red one\n<turn|>", add_special_tokens=False)["input_ids"]
    assert TokenText(tokenizer, {tokenizer.eos_token_id}).answer(ids) == "red one"


def test_shuffled_answers_are_all_there_and_none_is_with_its_question() -> None:
    rows = _rows(*[([1, 10 + n, 30 + n, 9], "..TT") for n in range(20)], ([7, 8], "TT"))
    shuffled = shuffle_answers(rows, seed=3)
    before, after = read_questions(rows), read_questions(shuffled)
    assert [question.prompt for question in before] == [question.prompt for question in after]
    assert {question.answer for question in before} == {question.answer for question in after}
    pairs = zip(before, after, strict=True)
    assert all(one.answer != other.answer for one, other in pairs)
    assert shuffled.row_ids.tolist() == rows.row_ids[:20].tolist()
    assert shuffle_answers(rows, seed=3).fingerprint == shuffled.fingerprint
    assert shuffle_answers(rows, seed=4).fingerprint != shuffled.fingerprint
